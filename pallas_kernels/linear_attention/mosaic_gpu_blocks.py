"""What the kernels of linear attention share: which blocks a program has, their keys, who sees whom."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.sizes import ROWS
from pallas_kernels.linear_attention.mosaic_gpu_tiling import MULTIPROCESSORS, Tiling


@dataclasses.dataclass(frozen=True)
class Places:
    """The blocks that a program goes through; programs that run together read neighbouring heads of the same tokens."""

    rows: int
    blocks: int
    key_heads: int

    @property
    def total(self) -> int:
        return self.rows * self.blocks * self.key_heads

    @property
    def programs(self) -> int:
        return min(MULTIPROCESSORS, self.total)

    def count(self, program: jax.Array) -> jax.Array:
        """Blocks of a program."""
        return lax.div(self.total - 1 - program, self.programs) + 1

    def of(self, program: jax.Array, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row, key head and block of a program's i-th block."""
        place = program + i * self.programs
        k, place = lax.rem(place, self.key_heads), lax.div(place, self.key_heads)
        return lax.div(place, self.blocks), k, lax.rem(place, self.blocks)


def key_tile(array: Any, row: jax.Array, start: jax.Array, k: jax.Array) -> Any:
    """The keys or values from `start` on; some other tile if it would begin before the row."""
    return array.at[row, pl.ds(jnp.maximum(start, 0), ROWS), k]


def real_keys(tiling: Tiling, start: jax.Array) -> jax.Array:
    """Which keys of a tile there are and some query of the row sees; features of the others must be 0."""
    return launch.row_iota(ROWS) < jnp.where(start >= 0, tiling.shape.tokens - tiling.key_lag - start, 0)


def seen(tiling: Tiling, scores: jax.Array, *, query_axis: int) -> jax.Array:
    """Scores of aligned tiles, with 0 where the query does not see the key."""
    row, column = (launch.iota(scores.shape, axis) for axis in (0, 1))
    # A thread has columns c + 8 i and c + 8 i + 1 of a row, with c in 0, 2, 4, 6. Taken apart, c is one register of
    # the thread and the rest are constants of the program.
    own, rest = column & 6, column & ~6
    if query_axis == 0:
        return jnp.where(row - own - int(tiling.strict) >= rest, scores, 0.0)
    return jnp.where(row - own + int(tiling.strict) <= rest, scores, 0.0)
