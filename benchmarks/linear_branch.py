"""How near residual linear attention comes to the device's rate of matrix products.

One row for each length T at the same number of tokens: forward, and forward with the gradients of queries, keys and
values. The rate counts every product of the chunked form once, in blocks of 64 tokens and only at and below their
diagonals: forward K 2 H^2 for states, N (2 H^2 + 3 H 64 / 2) for what is read; the backward pass twice as many, and
those of the states' gradients with the N heads. `share` is of the rate measured on a large product in the same run.

  python benchmarks/linear_branch.py --profile
"""

import argparse
import functools
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import card, step_profile
from rat_jax import program
from rat_jax.ops.residual_linear_attention import residual_linear_attention

_BLOCK = 64  # tokens, of the products that are counted


def operations(tokens: int, heads: int, key_heads: int, head_dim: int) -> tuple[float, float]:
    """Operations of all products for so many tokens: of the forward pass, of both."""
    in_blocks = 3 * heads * head_dim * _BLOCK / 2
    of_keys, of_heads = 2 * key_heads * head_dim**2, 2 * heads * head_dim**2
    forward = of_keys + of_heads + in_blocks
    backward = 2 * of_heads + 2 * of_keys + 2 * in_blocks  # reverse states, d_query; d_key, d_value
    return 2 * tokens * forward, 2 * tokens * (forward + backward)


def main() -> None:
    """Prints the table."""
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 131072])
    parser.add_argument("--tokens", type=int, default=262_144, help="of every row of the table")
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key_heads", type=int, default=4)
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--implementation", default=None, help="of linear attention; left out: the library's own")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="what the time of both passes goes to")
    flags = parser.parse_args()
    card.share_memory()
    if flags.profile:
        step_profile.name_every_kernel()
    ceilings = card.measure_ceilings(flags.repeats)
    print(card.describe())
    print(
        f"{flags.heads} heads of {flags.head_dim}, K {flags.key_heads}, window {flags.window}, bf16, {flags.tokens} "
        f"tokens; products {ceilings.tflop_per_s:.0f} TFLOP/s"
    )
    print(f"\n{'T':>7} {'pass':<8} {'ms':>8} {'+-':>6} {'TFLOP/s':>8} {'share':>6} {'GB':>6}")

    def attend(query, key, value):
        options = {"window": flags.window, "implementation": flags.implementation}
        return residual_linear_attention(query, key, value, **options).out

    counted = operations(flags.tokens, flags.heads, flags.key_heads, flags.head_dim)
    for tokens in flags.lengths:
        draw = functools.partial(_random, flags.tokens // tokens, tokens, flags.head_dim)
        inputs = draw(0, flags.heads), draw(1, flags.key_heads), draw(2, flags.key_heads)
        d_out = draw(3, flags.heads)
        passes = {"forward": (attend, inputs), "both": (functools.partial(_both, attend), (d_out, *inputs))}
        for (name, (function, arrays)), number in zip(passes.items(), counted, strict=True):
            compiled = jax.jit(function).lower(*arrays).compile()
            times = card.time_compiled(compiled, arrays, flags.repeats)
            rate = number / times.ms / 1e9
            print(
                f"{tokens:>7} {name:<8} {times.ms:>8.3f} {times.spread_ms:>6.3f} {rate:>8.0f} "
                f"{rate / ceilings.tflop_per_s:>6.1%} {card.held_gb(compiled):>6.2f}",
                flush=True,
            )
        if flags.profile:
            with tempfile.TemporaryDirectory() as folder:
                print(step_profile.report(step_profile.trace(compiled, arrays, folder)), flush=True)


def _both(attend, d_out, *inputs):
    out, pull = jax.vjp(attend, *inputs)
    return out, pull(d_out)


def _random(batch: int, tokens: int, head_dim: int, seed: int, heads: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (batch, tokens, heads, head_dim), jnp.bfloat16)


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
