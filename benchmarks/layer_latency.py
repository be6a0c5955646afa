"""Latency and memory of one layer's token mixing, for every mixer and every body of the RAT op, in one run.

A layer is norm, input projection, mixing, output projection and residual, in bfloat16. Each row of the table is one
length T at the same number of tokens, so that the batch is tokens / T. `train` is forward and backward with the
gradients of inputs and parameters, `prefill` the forward pass alone; times are medians of the device's own clock as the
host sees it, after warm-up. `floor` adds the matrix products at the measured rate and the least bytes of the mixing at
the measured copy bandwidth.

  python benchmarks/layer_latency.py --lengths 4096 16384 131072 --out layer_latency.png
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))

from rat_jax.layout import whole_rows
from rat_jax.ops.rat import rat_mix
from rat_jax.ops.recurrence import gated_recurrence
from rat_jax.ops.rope import rotate

EPSILON = 1e-6
CALLS = 5  # timed together


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384, 131072])
    parser.add_argument("--tokens", type=int, default=262_144, help="of every row of the table")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--chunk_size", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--layers", nargs="+", default=["attention", "local_attention", "rnn", "rat:xla", "rat:triton"])
    parser.add_argument("--out", default=None, help="PNG of the train latencies; the table goes beside it as JSON")
    return parser.parse_args()


def layer(kind: str, flags: argparse.Namespace) -> tuple[Callable[..., Any], int]:
    """The mixing of one kind, from projected to mixed tokens, and the channels it wants projected."""
    width, heads = flags.width, flags.heads
    match kind.split(":"):
        case ["attention"]:
            return functools.partial(_cudnn_attention, heads=heads, window=None), 3 * width
        case ["local_attention"]:
            return functools.partial(_cudnn_attention, heads=heads, window=flags.window), 3 * width
        case ["rnn"]:
            return _rnn, 3 * width
        case ["rat", implementation]:
            options = {"num_heads": heads, "num_groups": flags.groups, "chunk_size": flags.chunk_size}
            mix = functools.partial(_rat, implementation=implementation, rope_base=10_000.0, **options)
            return mix, 3 * width + 2 * flags.groups * width // heads
    raise SystemExit(f"no layer is called {kind!r}")


def _cudnn_attention(projected, gate_bias, *, heads, window):
    del gate_bias
    batch, tokens, channels = projected.shape
    value, query, key = (x.reshape(batch, tokens, heads, -1) for x in jnp.split(projected, 3, axis=-1))
    positions = whole_rows(batch, tokens).positions
    query, key = rotate(query, positions, 10_000.0), rotate(key, positions, 10_000.0)
    local = {} if window is None else {"local_window_size": (window, 0)}
    out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn", **local)
    return out.reshape(batch, tokens, channels // 3)


def _rnn(projected, gate_bias):
    z, value, gate = jnp.split(projected, 3, axis=-1)
    layout = whole_rows(*projected.shape[:2])
    states = gated_recurrence(
        gate.astype(jnp.float32) + gate_bias, value, starts=layout.starts(), is_token=layout.is_token
    )
    return (jax.nn.sigmoid(z.astype(jnp.float32)) * states).astype(projected.dtype)


def _rat(projected, gate_bias, **options):
    return rat_mix(projected, gate_bias, whole_rows(*projected.shape[:2]), **options).out


def apply_layer(mix: Callable[..., Any], params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """x + W_o mix(W_i norm(x))."""
    x32 = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + EPSILON)
    normed = (x32 * inverse * params["scale"]).astype(x.dtype)
    return x + mix(normed @ params["in"], params["gate_bias"]) @ params["out"]


def measure(function: Callable[..., Any], inputs: tuple[Any, ...], repeats: int) -> dict[str, float]:
    """Median milliseconds of a compiled call, and the bytes it holds beside its arguments and results."""
    compiled = jax.jit(function).lower(*inputs).compile()
    for _ in range(2):
        jax.block_until_ready(compiled(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(CALLS):  # queued one behind the other, so that the host's part of a call is hidden
            out = compiled(*inputs)
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / CALLS)
    memory = compiled.memory_analysis()
    held = memory.temp_size_in_bytes + memory.output_size_in_bytes + memory.argument_size_in_bytes
    return {"ms": statistics.median(times), "spread_ms": max(times) - min(times), "gb": held / 1e9}


def ceilings(repeats: int) -> tuple[float, float]:
    """Copy bandwidth in GB/s (bytes read and written) and bf16 matrix rate in TFLOP/s, as measured."""
    x = jax.random.normal(jax.random.key(0), (1 << 30,), jnp.bfloat16)
    copy_ms = measure(lambda x: x + jnp.bfloat16(1), (x,), repeats)["ms"]
    a = jax.random.normal(jax.random.key(1), (8192, 8192), jnp.bfloat16)
    product_ms = measure(lambda a: a @ a, (a,), repeats)["ms"]
    return 4 * (1 << 30) / copy_ms / 1e6, 2 * 8192**3 / product_ms / 1e9


def run(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each length and layer."""
    bandwidth, rate = ceilings(flags.repeats)
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}: copy {bandwidth:.0f} GB/s, bf16 products {rate:.0f} TFLOP/s")
    print(f"{'T':>7} {'layer':<16} {'train ms':>9} {'vs att':>7} {'floor':>7} {'prefill':>9} {'vs att':>7} {'GB':>6}")
    rows: list[dict[str, Any]] = []
    for tokens in flags.lengths:
        baseline: dict[str, float] = {}
        for kind in flags.layers:
            row = {"tokens": tokens, "layer": kind} | _row(kind, tokens, flags)
            channels = layer(kind, flags)[1]
            product_ms = 2 * flags.tokens * flags.width * (channels + flags.width) / rate / 1e9
            bytes_ms = 2 * flags.tokens * (2 * channels + 8 * flags.width) / bandwidth / 1e6
            row["floor_ms"] = 3 * product_ms + bytes_ms
            rows.append(row)
            if "error" in row:
                print(f"{tokens:>7} {kind:<16} {row['error']}", flush=True)
                continue
            baseline = baseline or row
            print(
                f"{tokens:>7} {kind:<16} {row['train_ms']:>9.2f} {baseline['train_ms'] / row['train_ms']:>6.2f}x "
                f"{row['floor_ms']:>7.1f} {row['prefill_ms']:>9.2f} "
                f"{baseline['prefill_ms'] / row['prefill_ms']:>6.2f}x {row['gb']:>6.1f}",
                flush=True,
            )
    return rows


def _row(kind: str, tokens: int, flags: argparse.Namespace) -> dict[str, Any]:
    mix, channels = layer(kind, flags)
    keys = jax.random.split(jax.random.key(0), 5)
    shape = (flags.tokens // tokens, tokens, flags.width)
    params = {
        "scale": jnp.ones((flags.width,), jnp.float32),
        "in": (0.02 * jax.random.normal(keys[0], (flags.width, channels))).astype(jnp.bfloat16),
        "out": (0.02 * jax.random.normal(keys[1], (flags.width, flags.width))).astype(jnp.bfloat16),
        "gate_bias": jax.random.normal(keys[2], (flags.width,)) + 2,
    }
    x, d_out = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[3:])

    def forward(params, x):
        return apply_layer(mix, params, x)

    def train(params, x, d_out):
        out, pull = jax.vjp(forward, params, x)
        return out, pull(d_out)

    try:
        train_row = measure(train, (params, x, d_out), flags.repeats)
        prefill_row = measure(forward, (params, x), flags.repeats)
    except jax.errors.JaxRuntimeError as error:  # out of memory: the table says so, the other rows go on
        return {"error": str(error).split("\n")[0][:90]}
    return {"train_ms": train_row["ms"], "prefill_ms": prefill_row["ms"], "gb": train_row["gb"]}


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Train latency over T, a line for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4))
    for kind in dict.fromkeys(row["layer"] for row in rows):
        points = [(row["tokens"], row["train_ms"]) for row in rows if row["layer"] == kind and "train_ms" in row]
        axes.plot(*zip(*points, strict=True), marker="o", label=kind)
    axes.set(xscale="log", yscale="log", xlabel="T, tokens of a sequence", ylabel="training step of a layer, ms")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> None:
    """Prints the table and writes what was asked for."""
    flags = arguments()
    rows = run(flags)
    if flags.out is not None:
        out = Path(flags.out)
        plot(rows, out)
        out.with_suffix(".json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
