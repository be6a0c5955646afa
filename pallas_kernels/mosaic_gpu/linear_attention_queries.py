"""Gradients of queries: d_phi(q) = d_out S_c^T + tril(d_out v^T) phi(k) for a block of tokens that S_c enters.

Tiles are divided between the warpgroups as in `linear_attention_outputs`.
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
from pallas_kernels.mosaic_gpu.linear_attention_features import half_features, pull_back
from pallas_kernels.mosaic_gpu.linear_attention_problem import BLOCK, TILES, LinearProblem

STAGES = 4  # tiles of keys, of d_out and of queries in flight, and of gradients on their way to memory


def linear_attention_queries_mosaic(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    states,  # [B, K, C, 2, H, H]: the sum that enters each block
    d_query,  # [B, T, N, H]
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
    steps = TILES * (1 + 2 * p.shared)  # of a block: its keys, then two tiles of d_out and two of queries a head
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
                step = of_keys + TILES * (1 + 2 * j)
                r = lax.rem(group + j, TILES)
                do = ring.wait(step)
                pl.when(j > 0)(lambda: release_stored(ring, step - TILES))

                def add(d_halves, d_scores, r):
                    for half in range(2):
                        plgpu.wgmma(d_halves[half], d_scores.astype(do.dtype), features.at[half, r])

                def on_diagonal(d_scores, *d_halves):
                    plgpu.wgmma(d_scores, do, plgpu.transpose_ref(values.at[r], (1, 0)))
                    for half in range(2):
                        plgpu.wgmma(d_halves[half], do, plgpu.transpose_ref(state.at[half], (1, 0)))
                    found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(d_scores, wait_n=2))
                    add(d_halves, seen(p, found, query_axis=0), r)
                    return tuple(d_half[...] for d_half in d_halves)

                def below_diagonal(_, d_halves):
                    def scores_of(d_scores):
                        plgpu.wgmma(d_scores, do, plgpu.transpose_ref(values.at[0], (1, 0)))
                        return d_scores[...]

                    found = pl.run_scoped(scores_of, plgpu.ACC((ROWS, ROWS), jnp.float32))
                    return pl.run_state(lambda refs: add(refs, found, 0))(tuple(map(plgpu.ACC.init, d_halves)))

                shapes = (ROWS, ROWS), (ROWS, p.head_dim), (ROWS, p.head_dim)
                d_halves = pl.run_scoped(on_diagonal, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
                d_halves = lax.fori_loop(0, r, below_diagonal, d_halves)
                ring.release(step)
                tile = ring.wait(step + TILES)
                plus, minus = (
                    pull_back(half_features(tile[...], half, softmax=p.softmax), d_halves[half], softmax=p.softmax)
                    for half in range(2)
                )
                tile[...] = (plus - minus).astype(tile.dtype)
                plgpu.commit_smem()
                at = pl.ds(block * BLOCK + r * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(tile, d_query.at[row, at, k * p.shared + j])

            state_ring.release(i)
            value_ring.release(i)
            release_stored(ring, of_keys + TILES * 2 * p.shared)
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
                step = i * steps + TILES * (1 + 2 * j)
                at = [
                    (row, pl.ds(block * BLOCK + lax.rem(g + j, TILES) * ROWS, ROWS), k * p.shared + j)
                    for g in range(COMPUTE_GROUPS)
                ]
                for g in range(COMPUTE_GROUPS):
                    ring.fill(step + g, d_out.at[at[g]])

                @pl.when(j == 0)
                def _of_block():
                    value_ring.fill(i, *(key_tile(value, row, start, k) for start in starts))
                    state_ring.fill(i, *(states.at[row, k, block, half] for half in range(2)))

                for g in range(COMPUTE_GROUPS):
                    ring.fill(step + TILES + g, query.at[at[g]])


def queries_gradient(
    p: LinearProblem, query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, states: jax.Array
) -> jax.Array:
    """d_query [B, T, N, H]; `states` are those of `linear_attention_sums.running_sums`."""
    dtype, H = jnp.dtype(p.dtype), p.head_dim
    places = Places(p.batch, p.blocks, p.key_heads)
    return launch.kernel(
        functools.partial(linear_attention_queries_mosaic, p=p, places=places),
        name=linear_attention_queries_mosaic.__name__,
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
    )(query, key, value, d_out, states)
