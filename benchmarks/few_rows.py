"""How fast few rows are normed and multiplied by matrices whose bytes are what counts: by XLA, and by Mosaic GPU.

One line for each implementation of `rat_jax.ops.normed_product` and each of its products in a decode step of
configs/rat_1b.py, and of attention's projection of the same width. The time is that of one of a chain of products
inside one jit, each with its own matrix; all matrices are more bytes than a cache holds. `mlp` is the chain up, down,
up, down, each of which reads what the one before wrote; down is XLA's in both lines. `share` is of the rate of a copy
measured in the same run; `off` is the norm of the difference from XLA's results in theirs. XLA multiplies a single row
as two, as the library's layers have it; but for GELU one of the two is then copied out, a launch of its own here that
whatever reads the result has inside elsewhere.

  timeout 150 python benchmarks/few_rows.py
  XLA_FLAGS=--xla_gpu_enable_command_buffer= timeout 150 python benchmarks/few_rows.py --rows 1   # without CUDA graphs
  python benchmarks/few_rows.py --small   # any machine, XLA alone: the kernel needs a Hopper GPU
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import sys
import time
import typing
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import card
from rat_jax import program
from rat_jax.layers import INITIAL_STD, NORM_EPSILON
from rat_jax.ops.normed_product import NormedProductImplementation, normed_product
from rat_jax.ops.normed_product_xla import multiply_rows

CHAIN_BYTES = 800e6  # of the matrices of a chain, many times a cache's
LONGEST = 24  # products of a chain
THREADS = 16  # that compile
IMPLEMENTATIONS = typing.get_args(NormedProductImplementation)  # XLA first, with which others are compared
REASONS = (jax.errors.JaxRuntimeError, ValueError, NotImplementedError)  # for which a line has no figures


@dataclasses.dataclass(frozen=True)
class Product:
    """Rows times [inputs, outputs], with a norm before or by XLA alone."""

    inputs: int
    outputs: int
    normed: bool = True
    gelu: bool = False

    @functools.partial(jax.jit, static_argnums=(0, 1))  # traced and lowered once for a whole chain
    def __call__(self, implementation: str, x: jax.Array, scale: jax.Array, matrix: jax.Array) -> jax.Array:
        if not self.normed:
            return multiply_rows(x, matrix)
        options = {"epsilon": NORM_EPSILON, "gelu": self.gelu, "implementation": implementation}
        return normed_product(x, scale, matrix, **options)


SIZES = {
    "in_proj": (Product(2048, 6656),),
    "attention": (Product(2048, 6144),),
    "up": (Product(2048, 8192, gelu=True),),
    "mlp": (Product(2048, 8192, gelu=True), Product(8192, 2048, normed=False)),
}
SMALL = {
    "in_proj": (Product(256, 832),),
    "attention": (Product(256, 768),),
    "up": (Product(256, 512, gelu=True),),
    "mlp": (Product(256, 512, gelu=True), Product(512, 256, normed=False)),
}


@dataclasses.dataclass(frozen=True)
class Chain:
    """Products one after the other; several in turn each read what the one before wrote."""

    products: tuple[Product, ...]
    rows: int

    @property
    def num_bytes(self) -> int:
        """Of all matrices."""
        return sum(2 * product.inputs * product.outputs for product in self.all())

    def all(self) -> list[Product]:
        num_bytes = sum(2 * product.inputs * product.outputs for product in self.products)
        return [*self.products] * min(LONGEST // len(self.products), max(2, round(CHAIN_BYTES / num_bytes)))

    def run(self, implementation: str, rows, matrices, scale) -> list[jax.Array]:
        outs: list[jax.Array] = []
        for i, (product, matrix) in enumerate(zip(self.all(), matrices, strict=True)):
            x = rows[i % len(rows)]
            if outs and len(self.products) > 1:
                x = outs.pop()
            elif outs:
                x, outs[-1] = jax.lax.optimization_barrier((x, outs[-1]))  # no launch, but an order
            outs.append(product(implementation, x, scale, matrix))
        return outs

    def arguments(self, seed: int = 0) -> tuple:
        """Random arrays for `run`."""
        products = self.all()
        keys = iter(jax.random.split(jax.random.key(seed), 2 * len(products) + 1))
        feeds, inputs = len(self.products) > 1, self.products[0].inputs
        rows = [_draw(next(keys), (self.rows, 1, inputs), 1.0) for _ in range(1 if feeds else len(products))]
        matrices = [_draw(next(keys), (product.inputs, product.outputs), INITIAL_STD) for product in products]
        return rows, matrices, 1 + _draw(next(keys), (inputs,), 0.1).astype(jnp.float32)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], std: float) -> jax.Array:
    return std * jax.random.normal(key, shape, jnp.bfloat16)


Programs = dict[str, concurrent.futures.Future | str]  # by implementation


def compile_all(chains: Sequence[Chain]) -> list[Programs]:
    """The programs of each chain, or why there is none; nothing else runs on the device meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        return [{name: _start(pool, chain, name) for name in IMPLEMENTATIONS} for chain in chains]


def _start(pool: concurrent.futures.Executor, chain: Chain, implementation: str) -> concurrent.futures.Future | str:
    run = functools.partial(chain.run, implementation)
    try:
        return pool.submit(jax.jit(run).lower(*jax.eval_shape(chain.arguments)).compile)
    except REASONS as error:
        return card.reason(error)


def measure(chain: Chain, programs: Programs, label: str, copy_gb_per_s: float, repeats: int) -> None:
    """Prints a line for each program of a chain."""
    arguments, want = chain.arguments(), None
    for name, compiled in programs.items():
        line = f"{label} {name:<10}"
        if isinstance(compiled, str):
            print(f"{line} {compiled}", flush=True)
            continue
        try:
            run = compiled.result()
            outs = [np.asarray(out, np.float32) for out in run(*arguments)]
            times = card.time_compiled(run, arguments, repeats)
        except REASONS as error:
            print(f"{line} {card.reason(error)}", flush=True)
            continue
        want = want or outs
        off = max(map(_difference, outs, want))
        rate, count = chain.num_bytes / times.ms / 1e6, len(chain.all())
        print(
            f"{line} {1e3 * times.ms / count:>7.2f} {1e3 * times.spread_ms / count:>6.2f} "
            f"{rate:>7.0f} {rate / copy_gb_per_s:>6.1%} {off:>8.5f}",
            flush=True,
        )


def _difference(found: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(found - want) / np.linalg.norm(want))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2, 16])
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=85, help="after which no further chain is timed")
    parser.add_argument("--small", action="store_true", help="products of few bytes, to try the program")
    flags = parser.parse_args(arguments)
    for name, values in (("rows", flags.rows), ("repeats", [flags.repeats]), ("seconds", [flags.seconds])):
        if min(values) < 1:
            parser.error(f"--{name} must be 1 or more, got {min(values):g}")
    return flags


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the table."""
    flags = parse(arguments)
    deadline = time.monotonic() + flags.seconds
    card.share_memory()
    copy_gb_per_s = card.measure_ceilings(flags.repeats).copy_gb_per_s
    print(card.describe())
    print(f"bf16, a copy moves {copy_gb_per_s:.0f} GB/s")
    print(
        f"\n{'product':<9} {'rows':>4} {'by':<10} {'us':>7} {'+-':>6} {'GB/s':>7} {'share':>6} {'off':>8}", flush=True
    )
    sizes = SMALL if flags.small else SIZES
    lines = list(itertools.product(flags.rows, flags.sizes))
    chains = [Chain(sizes[name], rows) for rows, name in lines]
    for (rows, name), chain, programs in zip(lines, chains, compile_all(chains), strict=True):
        label = f"{name:<9} {rows:>4}"
        if time.monotonic() > deadline:
            print(f"{label} not measured: --seconds {flags.seconds:g} are over", flush=True)
            continue
        measure(chain, programs, label, copy_gb_per_s, flags.repeats)


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
