"""What the Mosaic GPU kernels share: the warpgroups of a program, its place in the call, tiles, the filling loop.

Two warpgroups compute, each for ROWS rows of the matrix products; a third one only copies. The registers that it gives
up let the others hold their accumulators.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

COMPUTE_GROUPS = 2
MEMORY_GROUP = COMPUTE_GROUPS
LAUNCH_REGISTERS = 168  # of each thread of three warpgroups when a program starts, and on average ever after
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40
NEIGHBOURS = 32  # rows and heads whose programs follow each other block by block, so that they share what they read


@dataclasses.dataclass(frozen=True)
class Order:
    """Which block of which row and head (or group of heads) a program computes; blocks 0 start first."""

    blocks: int
    rows: int
    heads: int

    @property
    def programs(self) -> int:
        return self.blocks * self.rows * self.heads

    def place(self, program: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Block, row and head."""
        pairs = math.gcd(self.rows * self.heads, NEIGHBOURS)
        neighbourhood, rest = lax.div(program, pairs * self.blocks), lax.rem(program, pairs * self.blocks)
        pair = neighbourhood * pairs + lax.rem(rest, pairs)
        return lax.div(rest, pairs), lax.div(pair, self.heads), lax.rem(pair, self.heads)


def kernel(
    body: Callable[..., None],
    *,
    name: str,
    programs: int,
    out_type: Any,
    scratch_types: Any,
    groups: int = COMPUTE_GROUPS + 1,
    cluster: Mapping[str, int] | None = None,
):
    """The kernel as a function of arrays; lowered text shows its `name`.

    With a `cluster`, the names and sizes of its axes, there are so many programs in the place of each.
    """
    axes = {"cluster": tuple(cluster.values()), "cluster_names": tuple(cluster)} if cluster else {}
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=scratch_types,
        grid=(programs,),
        grid_names=("program",),
        **axes,
        num_threads=groups,
        thread_name="group",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
    )


def tiled(shape: tuple[int, ...], dtype) -> Any:
    """Shared memory as matrix instructions read it: tiles of eight rows, swizzled over 128 bytes."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def zeros(shape: tuple[int, int]) -> jax.Array:
    """Float32 zeros as an accumulator lies in registers."""
    return plgpu.layout_cast(jnp.full(shape, 0, jnp.float32), plgpu.Layout.WGMMA)


def row_zeros(rows: int) -> jax.Array:
    """Float32 zeros, one for every row of an accumulator."""
    return plgpu.layout_cast(jnp.full((rows,), 0, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def iota(shape: tuple[int, int], axis: int) -> jax.Array:
    """The index along an axis, laid out like an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)


def row_iota(rows: int) -> jax.Array:
    """The index of every row of an accumulator."""
    return plgpu.broadcasted_iota(jnp.int32, (rows,), 0, layout=plgpu.Layout.WGMMA.reduce(1))


def load_rows(ref: Any, axis: int, *, layout: Any = plgpu.Layout.WGMMA, optimized: bool = True) -> jax.Array:
    """A vector to be broadcast along an axis of an accumulator; from global memory, not `optimized`."""
    return _load(ref, layout=layout.reduce(axis), optimized=optimized)


def load_matrix(ref: Any) -> jax.Array:
    """A matrix in global memory, laid out like an accumulator."""
    return _load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def load_tile(ref: Any) -> jax.Array:
    """A matrix in shared memory, laid out like an accumulator."""
    return _load(ref, layout=plgpu.Layout.WGMMA)


def load_transposed(ref: Any) -> jax.Array:
    """The transpose of a matrix in shared memory, laid out as `transposed` has it."""
    return _load(ref.transpose((1, 0)), layout=plgpu.Layout.WGMMA_TRANSPOSED)


def _load(ref: Any, **options: Any) -> jax.Array:
    """All of an array in memory."""
    index = () if jax.__version_info__ >= (0, 12) else ((),)  # jax 0.12 has dropped the argument
    return plgpu.load(ref, *index, **options)


def transposed(x: jax.Array) -> jax.Array:
    """A value laid out like an accumulator, but that a thread holds pairs along the first axis, not the second."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def ceil_div(a: jax.Array, b: int) -> jax.Array:
    return lax.div(a + (b - 1), jnp.int32(b))


def meet(barrier: Any) -> None:
    """Waits until all warpgroups that arrive on it are here."""
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)


@dataclasses.dataclass(frozen=True)
class Ring:
    """Stages in shared memory that are filled in turn, each again as soon as its consumers have left it.

    Attributes:
      tiles: [stages, tile] or, where a stage has several tiles, [stages, tiles, tile].
      filled: barriers of the stages, on which a copy of each tile arrives.
      consumed: barriers of the stages, on which consumers arrive.
    """

    tiles: Any
    filled: Any
    consumed: Any

    @property
    def stages(self) -> int:
        return self.tiles.shape[0]

    def fill(self, step: jax.Array, *sources: Any) -> None:
        """Starts the copies of a step, once what its stage held has been consumed."""
        stage = lax.rem(step, self.stages)
        self.await_free(step)
        for i, source in enumerate(sources):
            tile = self.tiles.at[stage, i] if len(sources) > 1 else self.tiles.at[stage]
            plgpu.copy_gmem_to_smem(source, tile, self.filled.at[stage])

    def await_free(self, step: jax.Array) -> None:
        """Waits until what a step's stage held has been consumed."""
        pl.when(step >= self.stages)(lambda: plgpu.barrier_wait(self.consumed.at[lax.rem(step, self.stages)]))

    def put(self, step: jax.Array, tile: jax.Array) -> None:
        """Stores a tile that a warpgroup has computed, as `fill` copies one."""
        self.await_free(step)
        self.store(step, tile)

    def store(self, step: jax.Array, tile: jax.Array) -> None:
        """As `put`, after `await_free`."""
        stage = lax.rem(step, self.stages)
        self.tiles.at[stage][...] = tile
        plgpu.commit_smem()
        plgpu.barrier_arrive(self.filled.at[stage])

    def wait(self, step: jax.Array) -> Any:
        """The stage of a step, once it is filled; a consumer waits for every step of a stage that it waits for."""
        stage = lax.rem(step, self.stages)
        plgpu.barrier_wait(self.filled.at[stage])
        return self.tiles.at[stage]

    def release(self, step: jax.Array) -> None:
        plgpu.barrier_arrive(self.consumed.at[lax.rem(step, self.stages)])


def ring_types(stages: int, shape: tuple[int, ...], dtype, *, consumers: int) -> tuple[Any, Any, Any]:
    """Scratch types of a ring's fields; `shape` is that of a stage, its tiles first where it has several."""
    copies = shape[0] if len(shape) > 2 else 1
    filled = plgpu.Barrier(num_arrivals=copies, num_barriers=stages)
    return tiled((stages, *shape), dtype), filled, plgpu.Barrier(num_arrivals=consumers, num_barriers=stages)


def produce(steps: jax.Array, stages: int, *rings: tuple[Any, Callable[[jax.Array], None]]) -> None:
    """Fills the stages of rings in turn, each again as soon as its consumers have left it.

    Args:
      steps: fillings of every ring.
      stages: of every ring.
      *rings: the barriers on which consumers arrive, and what fills the stage of a step.
    """

    @pl.loop(0, jnp.minimum(steps, stages))
    def _first(step):
        for _, fill in rings:
            fill(step)

    @pl.loop(jnp.minimum(steps, stages), steps)
    def _again(step):
        for consumed, fill in rings:
            plgpu.barrier_wait(consumed.at[lax.rem(step, stages)])
            fill(step)
