"""Few rows, normed, times a matrix of weights, which is brought by bulk copies ahead of use.

Sums, norm and GELU (by erf) are float32; rows are rounded once after the norm, and the result once. A program owns a
strip of the matrix. One warpgroup copies it tile by tile into a ring of shared memory and waits for nothing but free
stages. The other one norms the rows meanwhile, which all programs do for themselves, and multiplies: the strip,
transposed, is the left operand of the matrix instructions, whose right one may have as few as 8 columns, the rows.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.normed_product.mosaic_gpu_tiling import (
    CHUNK,
    COLUMNS,
    DEPTH,
    NORM_CHANNELS,
    TILE_ROWS,
    num_tiles,
    padded_rows,
    programs,
    stages,
)
from pallas_kernels.normed_product.shape import NormedProductShape

COMPUTE, MEMORY = 0, 1  # the warpgroups of a program


def normed_product_mosaic(
    x,  # [M, D]
    scale,  # [runs, width] float32: runs of channels that are normed at a time
    matrix,  # [D, c]
    out,  # [M, c]
    row_tiles,  # [rows, D]
    scale_runs,  # as scale
    ring_tiles,
    ring_filled,
    ring_consumed,
    rows_loaded,
    out_tile,  # [rows, columns]
    *,
    shape: NormedProductShape,
    epsilon: float,
):
    """One program multiplies one strip."""
    ring = launch.Ring(ring_tiles, ring_filled, ring_consumed)
    rows, tiles = padded_rows(shape), num_tiles(shape)
    program = lax.axis_index("program")
    strip = pl.ds(program * COLUMNS, COLUMNS)
    # Copies take whole tiles of rows, which go beyond the last one: zeros are read there, and nothing is written. A
    # constant slice could not, so that its start looks like none.
    every_row = pl.ds(program - program, rows)

    @pl.when(lax.axis_index("group") == COMPUTE)
    def _compute():
        plgpu.copy_gmem_to_smem(x.at[every_row, pl.ds(0, shape.inputs)], row_tiles, rows_loaded)
        plgpu.copy_gmem_to_smem(scale, scale_runs, rows_loaded)
        plgpu.barrier_wait(rows_loaded)
        _norm(row_tiles, scale_runs, epsilon)

        def add_tile(step, acc):
            tile = ring.wait(step)

            def products(ref):
                for start in range(0, DEPTH, CHUNK):
                    left = tile.at[pl.ds(start, CHUNK)]
                    right = row_tiles.at[:, pl.ds(step * DEPTH + start, CHUNK)]
                    plgpu.wgmma(ref, left.transpose((1, 0)), right.transpose((1, 0)))

            acc = pl.run_state(products)(plgpu.ACC.init(acc))
            ring.release(step)
            return acc

        acc = launch.transposed(lax.fori_loop(0, tiles, add_tile, launch.zeros((COLUMNS, rows))))
        if shape.gelu:
            acc = launch.gelu(acc)
        out_tile.transpose((1, 0))[...] = acc.astype(out_tile.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_tile, out.at[every_row, strip])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(lax.axis_index("group") == MEMORY)
    def _memory():
        @pl.loop(0, tiles)
        def _fill(step):
            ring.fill(step, matrix.at[pl.ds(step * DEPTH, DEPTH), strip])


def _norm(row_tiles, scale_runs, epsilon):
    """Norms the rows in place, some channels of all at a time."""
    (rows, inputs), (runs, width) = row_tiles.shape, scale_runs.shape
    like = (width, rows)

    def run_of(i):
        return row_tiles.at[:, pl.ds(i * width, width)]

    def load(i):
        return launch.load_transposed(run_of(i)).astype(jnp.float32)

    def add_squares(i, total):
        run = load(i)
        return total + run * run

    def spread(vector, axis):
        return launch.transposed(lax.broadcast_in_dim(vector, like, [axis]))

    total = lax.fori_loop(0, runs, add_squares, launch.transposed(jnp.full(like, 0, jnp.float32)))
    inverse = lax.rsqrt(jnp.sum(total, axis=0) * (1.0 / inputs) + epsilon)

    @pl.loop(0, runs)
    def _scale(i):
        factors = launch.load_rows(scale_runs.at[i], 1, layout=plgpu.Layout.WGMMA_TRANSPOSED)
        normed = load(i) * spread(inverse, 1) * spread(factors, 0)
        run_of(i).transpose((1, 0))[...] = normed.astype(row_tiles.dtype)

    plgpu.commit_smem()


def multiply(
    shape: NormedProductShape, x: jax.Array, scale: jax.Array, matrix: jax.Array, *, epsilon: float
) -> jax.Array:
    """[M, c] in the dtype of x; see `rat_jax.ops.normed_product`.

    Args:
      shape: sizes for which `mosaic_gpu_tiling.unsupported_reason` has no reason.
      x: [M, D].
      scale: [D] float32.
      matrix: [D, c].
      epsilon: added to the mean square.
    """
    dtype, rows = jnp.dtype(shape.dtype), padded_rows(shape)
    width = math.gcd(shape.inputs, NORM_CHANNELS)
    kept = rows if shape.rows > TILE_ROWS else shape.rows  # copies go beyond the end of a single tile of rows alone
    if kept > shape.rows:
        x = jnp.pad(x, [(0, kept - shape.rows), (0, 0)])
    scale = scale.reshape(-1, width)
    return launch.kernel(
        functools.partial(normed_product_mosaic, shape=shape, epsilon=epsilon),
        name=normed_product_mosaic.__name__,
        programs=programs(shape),
        groups=2,
        out_type=jax.ShapeDtypeStruct((kept, shape.outputs), dtype),
        scratch_types=(
            launch.tiled((rows, shape.inputs), dtype),
            plgpu.SMEM(scale.shape, jnp.float32),
            *launch.ring_types(stages(shape), (DEPTH, COLUMNS), dtype, consumers=1),
            plgpu.Barrier(num_arrivals=2),
            launch.tiled((rows, COLUMNS), dtype),
        ),
    )(x, scale, matrix)[: shape.rows]
