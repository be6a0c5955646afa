"""What the kernels of linear attention that work on single blocks share: which blocks, their keys, their diagonals."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.launch import ROWS
from pallas_kernels.mosaic_gpu.linear_attention_features import half_features
from pallas_kernels.mosaic_gpu.linear_attention_problem import MULTIPROCESSORS, LinearProblem


@dataclasses.dataclass(frozen=True)
class Places:
    """The blocks that a program goes through; programs side by side read neighbouring heads of the same tokens."""

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


def real_keys(p: LinearProblem, start: jax.Array) -> jax.Array:
    """Which keys of a tile there are and some query of the row sees; features of the others must be 0."""
    return launch.row_iota(ROWS) < jnp.where(start >= 0, p.tokens - p.delay - start, 0)


def store_key_features(p: LinearProblem, tile: jax.Array, start: jax.Array, half: int, features: Any) -> None:
    """One half of phi of a tile of keys, into `features` [ROWS, H]."""
    found = half_features(tile, half, softmax=p.softmax, real=real_keys(p, start))
    features[...] = found.astype(features.dtype)
    plgpu.commit_smem()


def add_to_state(state: Any, features: Any, values: Any) -> None:
    """One half of a state [H, H] goes on to the next tile; it is rounded again, up to TILES - 1 times in a block."""
    sums = pl.run_state(lambda ref: plgpu.wgmma(ref, plgpu.transpose_ref(features, (1, 0)), values))(
        plgpu.ACC.init(state[...].astype(jnp.float32))
    )
    state[...] = sums.astype(state.dtype)
    plgpu.commit_smem()


def meet(barrier: Any) -> None:
    """Waits until both warpgroups that compute are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


def seen(p: LinearProblem, scores: jax.Array, *, query_axis: int) -> jax.Array:
    """Scores of tiles that stand beside each other, with 0 where the query does not see the key."""
    row, column = (launch.iota(scores.shape, axis) for axis in (0, 1))
    # A thread has columns c + 8 i and c + 8 i + 1 of a row, with c in 0, 2, 4, 6. Taken apart, c is one register of
    # the thread and the rest are constants of the program.
    own, rest = column & 6, column & ~6
    if query_axis == 0:
        return jnp.where(row - own - int(p.strict) >= rest, scores, 0.0)
    return jnp.where(row - own + int(p.strict) <= rest, scores, 0.0)


@dataclasses.dataclass(frozen=True)
class Sums:
    """What two warpgroups have of a tile is added up in the ring's tile that both have read, and copied to memory.

    Warpgroup 1 leaves its part there, rounded, once warpgroup 0 has read the tile; warpgroup 0 adds its own.

    Attributes:
      ring: whose tiles both warpgroups consume.
      read: barriers of its stages, on which warpgroup 0 arrives.
      stored: barriers of its stages, on which warpgroup 1 arrives.
    """

    ring: launch.Ring
    read: Any
    stored: Any

    def load(self, step: jax.Array, half: int) -> jax.Array:
        """The tile of a step, as it was filled."""
        found = self.ring.wait(step)[...]
        if half == 0:
            plgpu.barrier_arrive(self.read.at[lax.rem(step, self.ring.stages)])
        return found

    def store(self, step: jax.Array, half: int, part: jax.Array, target: Any) -> None:
        stage = lax.rem(step, self.ring.stages)
        tile = self.ring.tiles.at[stage]
        if half == 1:
            plgpu.barrier_wait(self.read.at[stage])
            tile[...] = part.astype(tile.dtype)
            plgpu.barrier_arrive(self.stored.at[stage])
            self.ring.release(step)
        else:
            plgpu.barrier_wait(self.stored.at[stage])
            tile[...] = (part + tile[...].astype(jnp.float32)).astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, target)

    def release(self, step: jax.Array, half: int) -> None:
        """Gives back the tile of a step, the last that this warpgroup has stored, once the copy has read it."""
        if half == 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.ring.release(step)


def sum_types(stages: int) -> tuple[Any, Any]:
    """Scratch types of the barriers of `Sums`."""
    return plgpu.Barrier(num_barriers=stages), plgpu.Barrier(num_barriers=stages)
