"""From what a mixer gives to what the next one's projection gives, for a token of few rows, in one launch.

Reading the matrices bounds the time. Each program owns a strip of columns of every one of them; of those that give the
D channels of the stream it has a part of the rows as well, so that all programs have work. One warpgroup copies its
tiles, in the order of their use, into a ring of shared memory and waits for nothing but free stages. The other one
multiplies them with the rows, by plain multiply-adds in float32, and meets the other programs between the products, at
semaphores: what they have stored is then read by all, who add up the parts for themselves. While it waits the ring
fills, so that the memory does not.

All programs must be on the card at once, or those that wait never end: one on a multiprocessor.

Sums, norms and GELU (by erf) are float32. The stream is rounded after each sum, as are the GELU's result and the
projection's; the normed stream is not.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.between_mixers.mosaic_gpu_tiling import (
    COLUMNS,
    DEPTH,
    STAGES,
    programs,
    splits,
    vector_size,
)
from pallas_kernels.between_mixers.shape import BetweenMixersShape
from pallas_kernels.launch import mosaic_gpu as launch

COMPUTE, MEMORY = 0, 1  # the warpgroups of a program
_AROUND, _AFTER, _HIDDEN = 0, 1, 2  # semaphores: parts of the first sum, of the second, and hidden units, by their part


def between_mixers_mosaic(
    mixed,  # [B, c]
    x,  # [B, D]
    scale,  # [D] float32
    out_matrix,  # [c, D]
    up,  # [D, F]
    down,  # [F, D]
    next_scale,  # [D] float32
    next_matrix,  # [D, outputs]
    y,  # [B, D]
    product,  # [B, outputs]
    out_parts,  # [splits, B, D] float32
    hidden,  # [B, F]
    down_parts,  # [splits, B, D] float32
    vectors,  # [B, channels] float32: what is multiplied
    scales,  # [D] float32
    ring_tiles,
    ring_filled,
    ring_consumed,
    *,
    shape: BetweenMixersShape,
    epsilon: float,
):
    """One program: its strips of all four products; `next_scale`, `next_matrix` and `product` are None without a next.

    Rows have values of their own throughout: lists of vectors.
    """
    ring = launch.Ring(ring_tiles, ring_filled, ring_consumed)
    rows, count = range(shape.rows), splits(shape)
    semaphores = pl.get_global(plgpu.SemaphoreType.REGULAR((_HIDDEN + count,)))
    program = lax.axis_index("program")
    wide = pl.ds(program * COLUMNS, COLUMNS)
    narrow_strips = shape.width // COLUMNS
    part = lax.div(program, narrow_strips)
    narrow = pl.ds(lax.rem(program, narrow_strips) * COLUMNS, COLUMNS)
    has_narrow = program < narrow_strips * count
    has_hidden = program < shape.hidden // COLUMNS
    has_output = program < shape.outputs // COLUMNS
    out_depth, down_depth = shape.inputs // count, shape.hidden // count
    # Tiles of a program's products, in the order of their use; a product it has no part in has none.
    out_tiles = jnp.where(has_narrow, out_depth // DEPTH, 0)
    up_tiles = jnp.where(has_hidden, shape.width // DEPTH, 0)
    down_tiles = jnp.where(has_narrow, down_depth // DEPTH, 0)
    up_first = out_tiles
    down_first = up_first + up_tiles
    next_first = down_first + down_tiles

    def signal(number):
        plgpu.semaphore_signal(semaphores.at[number], 1, memory_scope="gpu")

    def wait(number, value):
        plgpu.semaphore_wait(semaphores.at[number], value, decrement=False, memory_scope="gpu")

    @pl.when(lax.axis_index("group") == COMPUTE)
    def _compute():
        def products(first: jax.Array, tiles: int, *, normed: bool = False) -> Sequence[jax.Array]:
            """Of `vectors` and the strip whose tiles these are, [columns] a row."""
            return _products(ring, vectors, scales if normed else None, first, tiles, shape, epsilon)

        def stream(before: Sequence[jax.Array], parts: Any) -> Sequence[jax.Array]:
            """The stream after a sum, whose parts are there."""
            found = []
            for row in rows:
                total = before[row]
                for number in range(count):
                    total = total + _load(parts.at[number, row])
                found.append(total.astype(y.dtype).astype(jnp.float32))
            return found

        def store(values: Sequence[jax.Array], at: Callable[[int], Any]) -> None:
            for row, value in zip(rows, values, strict=True):
                launch.store_strip(at(row), value)

        @pl.when(has_narrow)
        def _out():
            _put(vectors, [_load(mixed.at[row, pl.ds(part * out_depth, out_depth)]) for row in rows])
            store(products(0, out_depth // DEPTH), lambda row: out_parts.at[part, row, narrow])
            signal(_AROUND)

        before = [_load(x.at[row]) for row in rows]
        scales[...] = _load(scale)
        wait(_AROUND, narrow_strips * count)
        around = stream(before, out_parts)

        @pl.when(has_hidden)
        def _up():
            _put(vectors, around)
            found = products(up_first, shape.width // DEPTH, normed=True)
            store([launch.gelu(value).astype(hidden.dtype) for value in found], lambda row: hidden.at[row, wide])
            signal(_HIDDEN + lax.div(program * COLUMNS, down_depth))

        @pl.when(has_narrow)
        def _down():
            wait(_HIDDEN + part, down_depth // COLUMNS)
            _put(vectors, [_load(hidden.at[row, pl.ds(part * down_depth, down_depth)]) for row in rows])
            store(products(down_first, down_depth // DEPTH), lambda row: down_parts.at[part, row, narrow])
            signal(_AFTER)

        @pl.when((program < shape.rows) | has_output)
        def _last():
            if shape.outputs:
                scales[...] = _load(next_scale)
            wait(_AFTER, narrow_strips * count)
            after = stream(around, down_parts)

            def store_stream(row):
                y.at[row][...] = after[row].astype(y.dtype)

            for row in rows:
                pl.when(program == row)(functools.partial(store_stream, row))
            if shape.outputs:

                @pl.when(has_output)
                def _next():
                    _put(vectors, after)
                    found = products(next_first, shape.width // DEPTH, normed=True)
                    store([value.astype(product.dtype) for value in found], lambda row: product.at[row, wide])

    @pl.when(lax.axis_index("group") == MEMORY)
    def _memory():
        def fill(first, tiles, matrix, start, strip):
            @pl.loop(0, tiles)
            def _fill(step):
                ring.fill(first + step, matrix.at[pl.ds(start + step * DEPTH, DEPTH), strip])

        fill(0, out_tiles, out_matrix, part * out_depth, narrow)
        fill(up_first, up_tiles, up, 0, wide)
        fill(down_first, down_tiles, down, part * down_depth, narrow)
        if shape.outputs:
            fill(next_first, jnp.where(has_output, shape.width // DEPTH, 0), next_matrix, 0, wide)


def after_last_mixer_mosaic(mixed, x, scale, out_matrix, up, down, y, *others, **sizes):
    """The same, where no mixer follows."""
    between_mixers_mosaic(mixed, x, scale, out_matrix, up, down, None, None, y, None, *others, **sizes)


def _products(ring, vectors, scales, first, tiles, shape, epsilon):
    """Products of the vectors with tiles of a strip; of normed and scaled vectors, if there are scales.

    The inverse root of the mean square is known when the product is, and multiplies it.
    """
    rows = range(shape.rows)

    def add_tile(step, carry):
        tile = ring.wait(first + step)
        sums, squares = map(list, carry)
        for start in range(0, DEPTH, COLUMNS):
            channels = pl.ds(step * DEPTH + start, COLUMNS)
            weights = launch.load_tile(tile.at[pl.ds(start, COLUMNS)]).astype(jnp.float32)
            for row in rows:
                vector = launch.load_rows(vectors.at[row, channels], 1)
                if scales is not None:
                    squares[row] = squares[row] + vector * vector
                    vector = vector * launch.load_rows(scales.at[channels], 1)
                sums[row] = sums[row] + weights * lax.broadcast_in_dim(vector, (COLUMNS, COLUMNS), [0])
        ring.release(first + step)
        return tuple(sums), tuple(squares)

    zeros = tuple(launch.zeros((COLUMNS, COLUMNS)) for _ in rows)
    no_squares = tuple(launch.row_zeros(COLUMNS) for _ in (() if scales is None else rows))
    sums, squares = lax.fori_loop(0, tiles, add_tile, (zeros, no_squares))
    found = [jnp.sum(total, axis=0) for total in sums]
    for row, square in enumerate(squares):
        square = jnp.sum(lax.broadcast_in_dim(square, (COLUMNS, COLUMNS), [0]), axis=0)
        found[row] = found[row] * lax.rsqrt(square * (1.0 / shape.width) + epsilon)
    return found


def _put(vectors, values) -> None:
    """Stores what the next product multiplies."""
    for row, value in enumerate(values):
        vectors.at[row, pl.ds(0, value.shape[0])][...] = value
    plgpu.commit_smem()


def _load(ref) -> jax.Array:
    return launch.load_divided(ref).astype(jnp.float32)


def run(
    shape: BetweenMixersShape,
    mixed: jax.Array,
    x: jax.Array,
    scale: jax.Array,
    out_matrix: jax.Array,
    up: jax.Array,
    down: jax.Array,
    following: tuple[jax.Array, jax.Array] | None,
    *,
    epsilon: float,
) -> tuple[jax.Array, ...]:
    """[B, D] and, where a mixer follows, [B, outputs]; see `rat_jax.ops.between_mixers`.

    Args:
      shape: sizes for which `mosaic_gpu_tiling.unsupported_reason` has no reason.
      mixed: [B, c].
      x: [B, D].
      scale: [D] float32, of the MLP's norm.
      out_matrix: [c, D].
      up: [D, F].
      down: [F, D].
      following: scale [D] float32 and matrix [D, outputs] of the next norm and projection; None: there is none.
      epsilon: added to the mean squares.
    """
    dtype, count = jnp.dtype(shape.dtype), splits(shape)
    parts = jax.ShapeDtypeStruct((count, shape.rows, shape.width), jnp.float32)
    results = [jax.ShapeDtypeStruct((shape.rows, size), dtype) for size in (shape.width, shape.outputs) if size]
    found = launch.kernel(
        functools.partial(
            between_mixers_mosaic if following else after_last_mixer_mosaic, shape=shape, epsilon=epsilon
        ),
        name=between_mixers_mosaic.__name__,
        programs=programs(shape),
        groups=2,
        out_type=(*results, parts, jax.ShapeDtypeStruct((shape.rows, shape.hidden), dtype), parts),
        scratch_types=(
            plgpu.SMEM((shape.rows, vector_size(shape)), jnp.float32),
            plgpu.SMEM((shape.width,), jnp.float32),
            *launch.ring_types(STAGES, (DEPTH, COLUMNS), dtype, consumers=1),
        ),
    )(mixed, x, scale, out_matrix, up, down, *(following or ()))
    return tuple(found[: len(results)])
