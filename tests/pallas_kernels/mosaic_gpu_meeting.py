"""A little kernel whose programs need what the others have computed, for which they meet at a semaphore."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch

SIDE = 64  # of a program's square part of the arrays


def meeting_mosaic(
    x,  # [programs, side, side]
    middle,  # as x
    out,  # as x
    tile,  # [side, side]
    all_tiles,  # as x
    x_loaded,
    middle_loaded,
    *,
    programs: int,
    several: bool,
):
    """Leaves x + 1 in `middle` and in `out` its sum over all programs, and over the program itself once more."""
    kind = plgpu.SemaphoreType.REGULAR
    semaphore = pl.get_global(kind((2,))).at[1] if several else pl.get_global(kind)
    program = lax.axis_index("program")

    @pl.when(lax.axis_index("group") == 0)
    def _compute():
        plgpu.copy_gmem_to_smem(x.at[program], tile, x_loaded)
        plgpu.barrier_wait(x_loaded)
        own = launch.load_tile(tile).astype(jnp.float32) + 1.0
        _store(own, tile, middle.at[program])
        plgpu.semaphore_signal(semaphore, 1, memory_scope="gpu")
        plgpu.barrier_wait(middle_loaded)
        for i in range(programs):
            own += launch.load_tile(all_tiles.at[i]).astype(jnp.float32)
        _store(own, tile, out.at[program])

    @pl.when(lax.axis_index("group") == 1)
    def _fetch():
        plgpu.semaphore_wait(semaphore, programs, decrement=False, memory_scope="gpu")
        plgpu.copy_gmem_to_smem(middle, all_tiles, middle_loaded)


def _store(value, tile, target):
    tile[...] = value.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, target)
    plgpu.wait_smem_to_gmem(0)


def meet(x: jax.Array, *, several: bool = False) -> tuple[jax.Array, jax.Array]:
    """`middle` and `out`; if `several`, semaphores are an array, of which one is used."""
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return launch.kernel(
        functools.partial(meeting_mosaic, programs=len(x), several=several),
        name=meeting_mosaic.__name__,
        programs=len(x),
        groups=2,
        out_type=(result, result),
        scratch_types=(
            launch.tiled((SIDE, SIDE), x.dtype),
            launch.tiled(x.shape, x.dtype),
            plgpu.Barrier(num_arrivals=1),
            plgpu.Barrier(num_arrivals=1),
        ),
    )(x)
