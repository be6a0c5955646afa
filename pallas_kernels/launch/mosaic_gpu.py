"""What the Mosaic GPU kernels share: the warpgroups of a program, its place in the call, tiles, the filling loop.

Two warpgroups compute, each for ROWS rows of the matrix products; a third one only copies. The registers that it gives
up let the others hold their accumulators.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith, vector

THREADS = 128  # of a warpgroup
COMPUTE_GROUPS = 2
MEMORY_GROUP = COMPUTE_GROUPS
LAUNCH_REGISTERS = 168  # of each thread of three warpgroups when a program starts, and on average ever after
COMPUTE_REGISTERS, MEMORY_REGISTERS = 232, 40
_ROOT_HALF = 0.5**0.5
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


def overwriting_kernel(
    body: Callable[..., None], *, name: str, programs: int, out_type: tuple[Any, ...], scratch_types: tuple[Any, ...]
):
    """The kernel of one warpgroup a program as a function of arrays, the last of which it overwrites.

    That one follows the results, as it is then. Nothing orders accesses to shared memory but the body, whose threads
    store rows only that they alone read.
    """

    def run(*arrays):
        ref = jax.new_ref(arrays[-1])
        results = pl.kernel(  # `plgpu.kernel` of jax 0.10 takes no references
            lambda *refs: pl.run_scoped(functools.partial(body, *refs), *scratch_types),
            out_type,
            mesh=plgpu.Mesh(grid=(programs,), grid_names=("program",), kernel_name=name),
            compiler_params=plgpu.CompilerParams(
                approx_math=True, unsafe_no_auto_barriers=True, lowering_semantics=plgpu.LoweringSemantics.Lane
            ),
            name=name,
        )(*arrays[:-1], ref)
        return *results, jax.freeze(ref)

    return run


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


def row_of_zeros(size: int) -> jax.Array:
    """Float32 zeros, the same number for every thread of a warpgroup."""
    return plgpu.layout_cast(jnp.full((size,), 0, jnp.float32), _row_layout(size))


def load_row(ref: Any) -> jax.Array:
    """A vector in any memory, the same number of elements for every thread of a warpgroup."""
    return _load(ref, layout=_row_layout(ref.shape[0]), optimized=False)


def load_row_of_other_half(ref: Any) -> jax.Array:
    """As `load_row` of float32, each element from the place of the one that is half a row away."""
    size = ref.shape[0]

    @plgpu.inline_mgpu(
        arg_types=(plgpu.RefType(),),
        return_type=plgpu.ShapeDtypeStruct((size,), jnp.float32, layout=_row_layout(size)),
    )
    def load(_, ref):
        layout = mgpu.WGStridedFragLayout((size,), size // THREADS)
        (index,) = layout.linear_thread_idxs()
        index = arith.remui(arith.addi(index, mgpu.c(size // 2, index.type)), mgpu.c(size, index.type))
        value = vector.load(ir.VectorType.get((layout.vec_size,), ir.F32Type.get()), ref, [index])
        return mgpu.FragmentedArray(_registers=np.array([value], object), _layout=layout, _is_signed=None)

    return load(ref)


def _row_layout(size: int) -> Any:
    return plgpu.Layout.WG_STRIDED((size,), vec_size=size // THREADS)


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


def load_divided(ref: Any) -> jax.Array:
    """A vector in global memory, whose elements the threads of a warpgroup divide among themselves."""
    (size,) = ref.shape
    layout = plgpu.Layout.WG_STRIDED((size,), vec_size=math.gcd(size // THREADS, 4))
    return _load(ref, layout=layout, optimized=False)


def store_strip(ref: Any, value: jax.Array) -> None:
    """Stores a vector that lies in registers as a sum over an accumulator's rows does, to global memory."""
    if jax.__version_info__ >= (0, 12):  # which refuses stores of less than 32 bytes a warp, of 16 bit, by default
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def _load(ref: Any, **options: Any) -> jax.Array:
    """All of an array in memory."""
    index = () if jax.__version_info__ >= (0, 12) else ((),)  # jax 0.12 has dropped the argument
    return plgpu.load(ref, *index, **options)


def transposed(x: jax.Array) -> jax.Array:
    """A value laid out like an accumulator, but that a thread holds pairs along the first axis, not the second."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def gelu(x: jax.Array) -> jax.Array:
    """The exact GELU, by erf."""
    return 0.5 * x * (1.0 + lax.erf(x * _ROOT_HALF))


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
