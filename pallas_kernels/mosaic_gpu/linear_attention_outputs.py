"""What queries read: out = phi(q) S_c + tril(phi(q) phi(k)^T) v for a block of tokens that S_c enters.

The warpgroups that compute take tiles of the query heads that share a key head in turn. Features of a tile of queries
stay in registers; those of the block's keys, its values and its state are shared.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.launch import COMPUTE_GROUPS, MEMORY_GROUP, ROWS
from pallas_kernels.mosaic_gpu.linear_attention_blocks import (
    Places,
    key_start,
    key_tile,
    meet,
    release_stored,
    seen,
    store_key_features,
)
from pallas_kernels.mosaic_gpu.linear_attention_features import half_features
from pallas_kernels.mosaic_gpu.linear_attention_problem import BLOCK, TILES, LinearProblem

STAGES = 4  # tiles of keys and queries in flight, and of outputs on their way to memory


def linear_attention_outputs_mosaic(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    states,  # [B, K, C, 2, H, H]: the sum that enters each block
    out,  # [B, T, N, H]
    tiles,
    filled,
    consumed,
    state_tiles,
    state_filled,
    state_consumed,
    value_tiles,
    value_filled,
    value_consumed,
    features,
    features_stored,
    features_read,
    *,
    p: LinearProblem,
    places: Places,
):
    """One program goes through blocks of a key head and, in each, through two tiles of every query head."""
    ring = launch.Ring(tiles, filled, consumed)
    state_ring = launch.Ring(state_tiles, state_filled, state_consumed)
    value_ring = launch.Ring(value_tiles, value_filled, value_consumed)
    steps = TILES * (1 + p.shared)  # of a block: its keys, then two tiles of each query head
    program, group = lax.axis_index("program"), lax.axis_index("group")

    @pl.when(group < COMPUTE_GROUPS)
    def _compute():
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")

        @pl.loop(0, places.count(program))
        def _block(i):
            row, k, block = places.of(program, i)
            of_keys = i * steps + group
            store_key_features(p, ring.wait(of_keys), key_start(p, block, group), features, group)
            ring.release(of_keys)
            meet(features_stored)
            state, values = state_ring.wait(i), value_ring.wait(i)

            @pl.loop(0, p.shared)
            def _head(j):
                step = of_keys + TILES * (1 + j)
                r = lax.rem(group + j, TILES)
                tile = ring.wait(step)
                halves = [half_features(tile[...], half, softmax=p.softmax).astype(tile.dtype) for half in range(2)]
                pl.when(j > 0)(lambda: release_stored(ring, step - TILES))

                def score(scores, r):
                    for half in range(2):
                        plgpu.wgmma(scores, halves[half], plgpu.transpose_ref(features.at[half, r], (1, 0)))

                def on_diagonal(scores, acc):
                    score(scores, r)
                    for half in range(2):
                        plgpu.wgmma(acc, halves[half], state.at[half])
                    found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=2))
                    plgpu.wgmma(acc, seen(p, found, query_axis=0).astype(tile.dtype), values.at[r])
                    return acc[...]

                def below_diagonal(_, acc):
                    def scores_of(scores):
                        score(scores, 0)
                        return scores[...].astype(tile.dtype)

                    found = pl.run_scoped(scores_of, plgpu.ACC((ROWS, ROWS), jnp.float32))
                    return pl.run_state(lambda ref: plgpu.wgmma(ref, found, values.at[0]))(plgpu.ACC.init(acc))

                shapes = (ROWS, ROWS), (ROWS, p.head_dim)
                acc = pl.run_scoped(on_diagonal, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
                acc = lax.fori_loop(0, r, below_diagonal, acc)
                tile[...] = acc.astype(tile.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(tile, out.at[row, pl.ds(block * BLOCK + r * ROWS, ROWS), k * p.shared + j])

            state_ring.release(i)
            value_ring.release(i)
            release_stored(ring, of_keys + TILES * p.shared)
            meet(features_read)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == MEMORY_GROUP)
    def _memory():
        plgpu.set_max_registers(launch.MEMORY_REGISTERS, action="decrease")

        @pl.loop(0, places.count(program))
        def _block(i):
            row, k, block = places.of(program, i)
            starts = [key_start(p, block, r) for r in range(TILES)]
            for r, start in enumerate(starts):
                ring.fill(i * steps + r, key_tile(key, row, start, k))

            @pl.loop(0, p.shared)
            def _head(j):
                for g in range(COMPUTE_GROUPS):
                    at = pl.ds(block * BLOCK + lax.rem(g + j, TILES) * ROWS, ROWS)
                    ring.fill(i * steps + TILES * (1 + j) + g, query.at[row, at, k * p.shared + j])

                @pl.when(j == 0)
                def _of_block():
                    state_ring.fill(i, *(states.at[row, k, block, half] for half in range(2)))
                    value_ring.fill(i, *(key_tile(value, row, start, k) for start in starts))


def outputs(p: LinearProblem, query: jax.Array, key: jax.Array, value: jax.Array, states: jax.Array) -> jax.Array:
    """What the queries read, [B, T, N, H]; `states` are those of `linear_attention_sums.running_sums`."""
    dtype, H = jnp.dtype(p.dtype), p.head_dim
    places = Places(p.batch, p.blocks, p.key_heads)
    return launch.kernel(
        functools.partial(linear_attention_outputs_mosaic, p=p, places=places),
        name=linear_attention_outputs_mosaic.__name__,
        programs=places.programs,
        out_type=jax.ShapeDtypeStruct(query.shape, dtype),
        scratch_types=(
            *launch.ring_types(STAGES, (ROWS, H), dtype, consumers=1),
            *launch.ring_types(1, (2, H, H), dtype, consumers=COMPUTE_GROUPS),
            *launch.ring_types(1, (TILES, ROWS, H), dtype, consumers=COMPUTE_GROUPS),
            launch.tiled((2, TILES, ROWS, H), dtype),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
        ),
    )(query, key, value, states)
