r"""Latency and memory of one layer, for every mixer and every implementation of its op, in one run.

A layer is norm, input projection, mixing, output projection and residual, in bfloat16. Each row of the first table is
one length T at the same number of tokens, so that the batch is tokens / T: `train` is forward and backward with the
gradients of inputs and parameters, `prefill` the forward pass alone. The second table is one decode step of many rows
at a position, with the cache updated in place. `torch:` rows are PyTorch layers under torch.compile, timed the same way
on the same device before JAX takes it.

Times are medians; +- is the slowest minus the fastest repeat. `floor` adds all matrix products (attention's scores too,
with two and a half times the forward's products in the backward) at the measured rate and the least bytes of norm and
mixing at the measured copy bandwidth; for a decode step it is the bytes of cache and matrices at that bandwidth.

  python benchmarks/layer_latency.py --out docs/layer_latency.png

RAttention beside attention in longer windows, with 4 key heads, and its step from position 1K to 1M:

  layers="cudnn_attention rattention:window=512"
  for window in 512 2048 4096; do layers="$layers cudnn_local_attention:window=$window"; done
  python benchmarks/layer_latency.py --key_heads 4 --lengths 8192 131072 --torch_lengths \
    --layers $layers --decode_layers $layers --decode_rows 16 \
    --decode_positions 1024 32768 1048576 --out docs/rattention_latency.png
"""

import argparse
import concurrent.futures
import functools
import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import caches, card, layers, timing
from benchmarks.printed_rows import rows_in
from rat_jax import program
from rat_jax.paths import local_path

BASELINE = layers.NAMES[0]  # what the others are compared with
ROPE_BASE = 10_000.0  # of every layer that rotates
DECODE_STEPS = 16  # in one call
COMPILERS = 4  # at a time; each may try matrix products on the device


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="*", default=[4096, 16384, 65536, 131072, 262144])
    parser.add_argument("--tokens", type=int, default=262_144, help="of every row of the table")
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key_heads", type=int, default=None, help="of attention and RAttention; left out: --heads")
    parser.add_argument("--groups", type=int, default=2, help="of RAT's queries and keys")
    parser.add_argument("--chunk_size", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument(
        "--layers", nargs="*", default=layers.NAMES + layers.IMPLEMENTATIONS, help="rattention:window=512, say"
    )
    parser.add_argument("--torch_layers", nargs="*", default=["attention", "rat"])
    parser.add_argument("--torch_lengths", type=int, nargs="*", default=[4096, 16384, 131072])
    parser.add_argument("--decode_layers", nargs="*", default=layers.NAMES)
    parser.add_argument("--decode_rows", type=int, default=512)
    parser.add_argument("--decode_positions", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--longest_ms", type=float, default=1500, help="slower layers are left out at longer T")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", default=None, help="PNG of the latencies; the tables go beside it as JSON")
    flags = parser.parse_args()
    if not 1 <= min(flags.lengths) <= max(flags.lengths) <= flags.tokens:
        parser.error(f"--lengths must lie between 1 and --tokens {flags.tokens}, got {flags.lengths}")
    if min(flags.decode_positions, default=DECODE_STEPS) < DECODE_STEPS:
        parser.error(f"--decode_positions must be {DECODE_STEPS} or more, got {flags.decode_positions}")
    return flags


def torch_rows(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the PyTorch layers, from a process of their own; rows that only give a reason where there are none."""
    wanted = [
        (tokens, kind) for tokens in flags.torch_lengths if tokens in flags.lengths for kind in flags.torch_layers
    ]
    rows: list[dict[str, Any]] = []
    why = "PyTorch is not installed"
    if wanted and importlib.util.find_spec("torch") is not None:
        numbers = {
            name: getattr(flags, name) for name in ("tokens", "width", "heads", "groups", "chunk_size", "repeats")
        }
        command = [
            sys.executable,
            Path(__file__).with_name("torch_layers.py"),
            "--layers",
            *flags.torch_layers,
            "--lengths",
        ]
        command += dict.fromkeys(str(tokens) for tokens, _ in wanted)
        command += [word for name, number in numbers.items() for word in (f"--{name}", str(number))]
        done = subprocess.run(command, capture_output=True, text=True)
        rows = [row for row in rows_in(done.stdout) if "layer" in row]
        why = (done.stderr.strip().splitlines() or ["the process of the PyTorch layers ended early"])[-1][:150]
    found = {(row["tokens"], row["layer"]) for row in rows}
    missing = [(tokens, f"torch:{kind}") for tokens, kind in wanted if (tokens, f"torch:{kind}") not in found]
    rows += [{"tokens": tokens, "layer": kind, "error": why} for tokens, kind in missing]
    return sorted(rows, key=lambda row: wanted.index((row["tokens"], row["layer"].removeprefix("torch:"))))


class Started(NamedTuple):
    """A layer's two programs while they are compiled, or why there are none."""

    params: Any
    programs: dict[str, concurrent.futures.Future[jax.stages.Compiled]]
    error: str | None


def start_passes(kind: str, sizes: layers.Sizes, x: jax.Array, pool: concurrent.futures.Executor) -> Started:
    """Lowers train and prefill of one layer here and has them compiled in the background."""
    try:
        graphdef, params = layers.make_layer(kind, sizes)
        train, prefill = (functools.partial(run, graphdef) for run in (layers.train_layer, layers.apply_layer))
        lowered = {"train": jax.jit(train).lower(params, x, x), "prefill": jax.jit(prefill).lower(params, x)}
    except (RuntimeError, ValueError, ImportError) as error:  # the table says so and goes on
        return Started({}, {}, card.reason(error))
    return Started(params, {name: pool.submit(program.compile) for name, program in lowered.items()}, None)


def pass_row(kind: str, started: Started, x: jax.Array, d_out: jax.Array, repeats: int) -> dict[str, Any]:
    """Train and prefill of one layer at one length, or why not."""
    row: dict[str, Any] = {"tokens": x.shape[1], "layer": kind}
    if started.error is not None:
        return row | {"error": started.error}
    try:
        for name, program in started.programs.items():
            compiled = program.result()
            inputs = (started.params, x, d_out)[: 3 if name == "train" else 2]
            times = card.time_compiled(compiled, inputs, repeats)
            row |= {f"{name}_ms": times.ms, f"{name}_spread_ms": times.spread_ms}
            row[f"{name}_gb"] = card.held_gb(compiled)
    except (RuntimeError, ValueError) as error:
        row["error"] = card.reason(error)
    return row


def pass_floors(kind: str, tokens: int, sizes: layers.Sizes, count: int, ceilings: card.Ceilings) -> dict[str, float]:
    """The least milliseconds of both passes and of the forward pass."""
    layer = layers.make_layer(kind.removeprefix("torch:"), sizes)
    projections, scores = layers.product_operations(*layer, count // tokens, tokens)
    forward_bytes, both_bytes = layers.min_bytes(*layer, count)
    return {
        "train_floor_ms": ceilings.product_ms(3 * projections + 3.5 * scores) + ceilings.copy_ms(both_bytes),
        "prefill_floor_ms": ceilings.product_ms(projections + scores) + ceilings.copy_ms(forward_bytes),
    }


def decode_row(kind: str, position: int, sizes: layers.Sizes, flags: argparse.Namespace) -> dict[str, Any]:
    """One decode step of one layer, or why not."""
    row: dict[str, Any] = {"position": position, "rows": flags.decode_rows, "layer": kind}
    try:
        graphdef, params = layers.make_layer(kind, sizes)
        x = jax.random.normal(jax.random.key(2), (flags.decode_rows, 1, sizes.width), layers.DTYPE)
        run = jax.jit(functools.partial(layers.decode, graphdef, DECODE_STEPS), donate_argnums=2)
        abstract_cache = jax.eval_shape(lambda: layers.init_memory(graphdef, params, flags.decode_rows, position))
        row["cache_gb"] = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract_cache)) / 1e9
        compiled = run.lower(params, x, abstract_cache, jnp.int32(position)).compile()
        row["gb"] = card.held_gb(compiled)
        cache = caches.random_contents(abstract_cache)

        def step():
            nonlocal cache
            out, cache = compiled(params, x, cache, jnp.int32(position))
            return out

        times = timing.time_calls(step, jax.block_until_ready, flags.repeats)
        row |= {"ms": times.ms / DECODE_STEPS, "spread_ms": times.spread_ms / DECODE_STEPS}
    except (RuntimeError, ValueError, ImportError) as error:
        row["error"] = card.reason(error)
    return row


def run_passes(sizes: layers.Sizes, flags: argparse.Namespace, ceilings: card.Ceilings) -> list[dict[str, Any]]:
    """Prints and returns the first table."""
    print(
        f"\n{'T':>7} {'layer':<24} {'train ms':>9} {'+-':>6} {'vs att':>7} {'vs torch':>8} {'floor':>7} "
        f"{'prefill':>9} {'+-':>6} {'vs att':>7} {'vs torch':>8} {'floor':>7} {'GB':>6}"
    )
    rows: list[dict[str, Any]] = []
    slow: dict[str, float] = {}
    for tokens in sorted(flags.lengths):
        others = [row for row in flags.torch_rows if row["tokens"] == tokens]
        known = {row["layer"]: row for row in others if "error" not in row}
        shape = (flags.tokens // tokens, tokens, sizes.width)
        x, d_out = (jax.random.normal(key, shape, layers.DTYPE) for key in jax.random.split(jax.random.key(1)))
        with concurrent.futures.ThreadPoolExecutor(COMPILERS) as pool:  # all is compiled before anything is timed
            started = {kind: start_passes(kind, sizes, x, pool) for kind in flags.layers if kind not in slow}
        for kind in [*flags.layers, *(row["layer"] for row in others)]:
            if kind in slow:
                why = f"not run: it took {slow[kind]:.0f} ms at a shorter length"
                row: dict[str, Any] = {"tokens": tokens, "layer": kind, "error": why}
            elif kind in started:
                row = pass_row(kind, started[kind], x, d_out, flags.repeats)
            else:
                row = next(row for row in others if row["layer"] == kind)
            rows.append(row)
            if "error" in row:
                print(f"{tokens:>7} {kind:<24} {row['error']}", flush=True)
                continue
            if row["train_ms"] > flags.longest_ms:
                slow[kind] = row["train_ms"]
            known[kind] = row
            row |= pass_floors(kind, tokens, sizes, flags.tokens, ceilings)
            parts = [
                f"{row[f'{name}_ms']:>9.2f} {row[f'{name}_spread_ms']:>6.2f} "
                f"{_ratio(known.get(BASELINE), row, f'{name}_ms'):>7} "
                f"{_ratio(known.get('torch:rat'), row, f'{name}_ms'):>8} {row[f'{name}_floor_ms']:>7.1f}"
                for name in ("train", "prefill")
            ]
            print(f"{tokens:>7} {kind:<24} {' '.join(parts)} {row['train_gb']:>6.1f}", flush=True)
    return rows


def run_decode(sizes: layers.Sizes, flags: argparse.Namespace, ceilings: card.Ceilings) -> list[dict[str, Any]]:
    """Prints and returns the second table."""
    print(f"\ndecode step of {flags.decode_rows} rows")
    print(
        f"{'position':>8} {'layer':<24} {'ms':>9} {'+-':>7} {'vs att':>7} {'floor':>7} {'cache GB':>9} {'peak GB':>8}"
    )
    rows: list[dict[str, Any]] = []
    for position in flags.decode_positions:
        baseline = None
        for kind in flags.decode_layers:
            row = decode_row(kind, position, sizes, flags)
            rows.append(row)
            if "error" in row:
                print(f"{position:>8} {kind:<24} {row['error']}", flush=True)
                continue
            min_bytes = layers.step_bytes(*layers.make_layer(kind, sizes), flags.decode_rows, position)
            row["floor_ms"] = ceilings.copy_ms(min_bytes)
            baseline = row if kind == BASELINE else baseline
            print(
                f"{position:>8} {kind:<24} {row['ms']:>9.3f} {row['spread_ms']:>7.3f} {_ratio(baseline, row, 'ms'):>7} "
                f"{row['floor_ms']:>7.3f} {row['cache_gb']:>9.2f} {row['gb']:>8.2f}",
                flush=True,
            )
    return rows


def _ratio(baseline: dict[str, Any] | None, row: dict[str, Any], name: str) -> str:
    return "" if baseline is None else f"{baseline[name] / row[name]:.2f}x"


def plot(passes: list[dict[str, Any]], steps: list[dict[str, Any]], path: Path, caption: str) -> None:
    """Train and prefill latency over T and a decode step's over the position, a line for each layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    pictures = [
        (passes, "tokens", "train_ms", "T, tokens of a sequence", "train of a layer, ms"),
        (passes, "tokens", "prefill_ms", "T, tokens of a sequence", "prefill of a layer, ms"),
        (steps, "position", "ms", "position", "a decode step of a layer, ms"),
    ]
    kinds = list(dict.fromkeys(row["layer"] for row in [*passes, *steps]))
    figure, panels = plt.subplots(1, len(pictures), figsize=(15, 4.5))
    for axes, (rows, across, up, xlabel, ylabel) in zip(panels, pictures, strict=True):
        for i, kind in enumerate(kinds):
            points = [(row[across], row[up]) for row in rows if row["layer"] == kind and "error" not in row]
            if points:
                style = "--" if kind.startswith("torch:") else "-"
                axes.plot(*zip(*points, strict=True), style, color=f"C{i}", marker="o", label=kind)
        axes.set(xscale="log", yscale="log", xlabel=xlabel, ylabel=ylabel)
        ticks = sorted({row[across] for row in rows})
        axes.set_xticks(ticks, [f"{tick / 1024:g}K" for tick in ticks], minor=False)
        axes.set_xticks([], minor=True)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    card.write_caption(figure, caption)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Prints the tables and writes what was asked for."""
    flags, start = arguments(), time.perf_counter()
    out = None if flags.out is None else local_path(flags.out, "--out")
    card.share_memory()
    key_heads = flags.heads if flags.key_heads is None else flags.key_heads
    settings = {
        "num_groups": flags.groups,
        "chunk_size": flags.chunk_size,
        "window": flags.window,
        "rope_base": ROPE_BASE,
    }
    sizes = layers.Sizes(flags.width, flags.heads, key_heads, settings)
    flags.torch_rows = torch_rows(flags)  # first: JAX does not give back memory that it has taken
    ceilings = card.measure_ceilings(flags.repeats)
    description = card.describe()
    print(description)
    print(
        f"D {flags.width}, {flags.heads} heads, K {key_heads}, G {flags.groups}, L {flags.chunk_size}, "
        f"window {flags.window}, bf16, {flags.tokens} tokens; copy {ceilings.copy_gb_per_s:.0f} GB/s, "
        f"products {ceilings.tflop_per_s:.0f} TFLOP/s"
    )
    passes = run_passes(sizes, flags, ceilings)
    steps = run_decode(sizes, flags, ceilings)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    if out is not None:
        plot(passes, steps, out, card.caption(jnp.dtype(layers.DTYPE).name))
        table = {"card": description, "sizes": sizes._asdict(), "tokens": flags.tokens, **ceilings._asdict()}
        out.with_suffix(".json").write_text(json.dumps(table | {"passes": passes, "decode": steps}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
