"""States of linear attention: running sums over blocks of phi(x)^T y, in either direction.

A block is of TILES tiles. In reverse only what leaves a segment is wanted: `linear_attention_keys` sums up again.

Each of the two warpgroups that compute holds one half of a state, [H, H], in the registers of its accumulator. A
block's array entry holds the sum that enters it from the side where the direction starts.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.mosaic_gpu import COMPUTE_GROUPS, MEMORY_GROUP
from pallas_kernels.launch.sizes import ROWS
from pallas_kernels.linear_attention.mosaic_gpu_blocks import key_tile, real_keys
from pallas_kernels.linear_attention.mosaic_gpu_features import half_features
from pallas_kernels.linear_attention.mosaic_gpu_tiling import TILES, Tiling

STAGES = 4  # tiles of x and y in flight


def linear_attention_sums_mosaic(
    x,  # [B, T, n, H], whose features are taken; n is N or K
    y,  # [B, T, n, H]
    entering,  # [B, K, segments, 2 H, H] float32: the sum that enters each segment
    *results,  # if it is kept [B, K, c, 2, H, H], the sum that enters each block; [B, K, segments, 2 H, H], what leaves
    tiling: Tiling,
    heads: int,
    reverse: bool,
    keep: bool,
):
    """One program goes through the blocks of a segment with a key head, and through its query heads if x has N."""
    *states, leaving, x_tiles, x_filled, x_consumed, y_tiles, y_filled, y_consumed, feature_tiles, state_tiles = results
    xs, ys = launch.Ring(x_tiles, x_filled, x_consumed), launch.Ring(y_tiles, y_filled, y_consumed)
    H, shared = tiling.shape.head_dim, heads // tiling.shape.key_heads
    program = lax.axis_index("program")
    k, segment = (
        lax.rem(program, tiling.shape.key_heads),
        lax.rem(lax.div(program, tiling.shape.key_heads), tiling.segments),
    )
    row = lax.div(program, tiling.shape.key_heads * tiling.segments)
    first = segment * tiling.span
    blocks = jnp.minimum(tiling.span, tiling.blocks - first)
    steps = TILES * shared  # of a block
    group = lax.axis_index("group")

    def block_of(i):
        return first + (blocks - 1 - i if reverse else i)

    def place(step):
        """First token and head of a step's tiles."""
        i, step = lax.div(step, steps), lax.rem(step, steps)
        start = (block_of(i) * TILES + lax.rem(step, TILES)) * ROWS
        return start if reverse else start - tiling.offset, k * shared + lax.div(step, TILES)

    def compute(half):
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")
        features = feature_tiles.at[half]
        of_half = pl.ds(half * H, H)

        def add_tile(step, state):
            x_tile, y_tile = xs.wait(step), ys.wait(step)
            real = None if reverse else real_keys(tiling, place(step)[0])  # zeros follow the last gradient
            found = half_features(x_tile[...], half, softmax=tiling.shape.softmax, real=real)
            features[...] = found.astype(features.dtype)
            plgpu.commit_smem()
            transposed = features.transpose((1, 0))
            state = pl.run_state(lambda ref: plgpu.wgmma(ref, transposed, y_tile))(plgpu.ACC.init(state))
            xs.release(step)
            ys.release(step)
            return state

        def add_block(i, state):
            if keep:
                tile = state_tiles.at[half]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                tile[...] = state.astype(tile.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, states[0].at[row, k, block_of(i), half])
            return lax.fori_loop(i * steps, (i + 1) * steps, add_tile, state)

        state = launch.load_matrix(entering.at[row, k, segment, of_half])
        state = lax.fori_loop(0, blocks, add_block, state)
        leaving.at[row, k, segment, of_half][...] = state
        plgpu.wait_smem_to_gmem(0)

    for half in range(2):
        pl.when(group == half)(functools.partial(compute, half))

    @pl.when(group == MEMORY_GROUP)
    def _memory():
        plgpu.set_max_registers(launch.MEMORY_REGISTERS, action="decrease")

        @pl.loop(0, blocks * steps)
        def _fill(step):
            start, n = place(step)
            xs.fill(step, key_tile(x, row, start, n))
            ys.fill(step, key_tile(y, row, start, n))


def sums(tiling: Tiling, x: jax.Array, y: jax.Array, entering: jax.Array, *, reverse: bool, keep: bool):
    """The sums that enter each block, [B, K, c, 2, H, H] in the dtype of y, if they are kept; those that leave.

    `entering`, float32 [B, K, segments, 2 H, H], is what enters each segment; what leaves has the same form. In reverse
    x is the query and y the gradient of the output, otherwise they are key and value.
    """
    dtype, H, heads = jnp.dtype(tiling.shape.dtype), tiling.shape.head_dim, x.shape[2]
    shape = tiling.shape.batch, tiling.shape.key_heads, tiling.blocks, 2, H, H
    states = [jax.ShapeDtypeStruct(shape, dtype)] if keep else []
    ring = launch.ring_types(STAGES, (ROWS, H), dtype, consumers=COMPUTE_GROUPS)
    found = launch.kernel(
        functools.partial(linear_attention_sums_mosaic, tiling=tiling, heads=heads, reverse=reverse, keep=keep),
        name=linear_attention_sums_mosaic.__name__,
        programs=tiling.shape.batch * tiling.shape.key_heads * tiling.segments,
        out_type=(*states, jax.ShapeDtypeStruct(entering.shape, jnp.float32)),
        scratch_types=(
            *ring,
            *ring,
            launch.tiled((COMPUTE_GROUPS, ROWS, H), dtype),
            launch.tiled((COMPUTE_GROUPS, H, H), dtype),
        ),
    )(x, y, entering)
    return found[0] if keep else None, found[-1]


def entering_sums(tiling: Tiling, x: jax.Array, y: jax.Array, entering: jax.Array, *, reverse: bool) -> jax.Array:
    """The sums that enter each segment, [B, K, segments, 2 H, H]; `entering`, [B, K, 2 H, H], enters the first.

    Where rows are too few to fill a card, their segments are summed up here in parallel, so that the products are
    taken twice.
    """
    entering = entering[:, :, None]
    if tiling.segments == 1:
        return entering
    nothing = jnp.zeros((*entering.shape[:2], tiling.segments, *entering.shape[3:]), jnp.float32)
    _, totals = sums(tiling, x, y, nothing, reverse=reverse, keep=False)
    up_to = lax.cumsum(totals, axis=2, reverse=reverse)
    before = up_to[:, :, 1:] if reverse else up_to[:, :, :-1]
    return entering + jnp.pad(before, [(0, 0), (0, 0), (0, 1) if reverse else (1, 0), (0, 0), (0, 0)])


def running_sums(tiling: Tiling, x: jax.Array, y: jax.Array, entering: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums that enter each block, and what leaves the last; `entering` as in `entering_sums`."""
    states, leaving = sums(tiling, x, y, entering_sums(tiling, x, y, entering, reverse=False), reverse=False, keep=True)
    return states, leaving[:, :, -1]
