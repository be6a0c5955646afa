"""What queries read: out = phi(q) S_c + tril(phi(q) phi(k)^T) v for a block of tokens that S_c enters.

Everything is a sum over the two halves of the features: each warpgroup that computes has one half, and the parts of a
tile of outputs are added up at the end.
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
    Sums,
    add_to_state,
    key_tile,
    seen,
    store_key_features,
    sum_types,
)
from pallas_kernels.mosaic_gpu.linear_attention_features import by_rows, half_weights, scales
from pallas_kernels.mosaic_gpu.linear_attention_problem import BLOCK, TILES, LinearProblem

STAGES = 6  # tiles of keys and queries in flight, and of outputs on their way to memory
VALUE_STAGES = 2  # tiles of values in flight


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
    read,
    stored,
    features,
    *,
    p: LinearProblem,
    places: Places,
):
    """One program goes through blocks of a key head and, in each, through the tiles of every query head."""
    ring = launch.Ring(tiles, filled, consumed)
    state_ring = launch.Ring(state_tiles, state_filled, state_consumed)
    value_ring = launch.Ring(value_tiles, value_filled, value_consumed)
    sums = Sums(ring, read, stored)
    steps = 1 + p.shared  # of a tile: its keys, then the queries of each head
    program, group = lax.axis_index("program"), lax.axis_index("group")

    def compute(half):
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")
        key_features = features.at[half]

        accumulators = plgpu.ACC((ROWS, p.head_dim), jnp.float32), plgpu.ACC((ROWS, ROWS), jnp.float32)

        @pl.loop(0, places.count(program))
        def _block(i):
            row, k, block = places.of(program, i)
            state = state_ring.wait(i).at[half]

            @pl.loop(0, TILES)
            def _tile(r):
                tile, start = i * TILES + r, block * BLOCK + r * ROWS
                step = tile * steps
                keys = ring.wait(step)[...]
                ring.release(step)
                store_key_features(p, keys, start - p.offset, half, key_features)
                values = value_ring.wait(tile)

                @pl.loop(0, p.shared)
                def _head(j):
                    at = step + 1 + j
                    weights = half_weights(sums.load(at, half), half, softmax=p.softmax)
                    queries, scale = weights.astype(tiles.dtype), scales(weights, softmax=p.softmax)
                    pl.when(j > 0)(lambda: sums.release(at - 1, half))
                    pl.when((j == 0) & (tile > 0))(lambda: sums.release(step - 1, half))

                    def products(acc, scores):
                        plgpu.wgmma(scores, queries, plgpu.transpose_ref(key_features, (1, 0)))
                        plgpu.wgmma(acc, queries, state)
                        found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1))
                        plgpu.wgmma(acc, seen(p, found, query_axis=0).astype(queries.dtype), values)
                        return acc[...]

                    acc = pl.run_scoped(products, *accumulators)
                    acc = acc if scale is None else acc * by_rows(scale, acc)
                    sums.store(at, half, acc, out.at[row, pl.ds(start, ROWS), k * p.shared + j])

                pl.when(r < TILES - 1)(lambda: add_to_state(state, key_features, values))
                value_ring.release(tile)

            state_ring.release(i)

        plgpu.wait_smem_to_gmem(0)

    for half in range(2):
        pl.when(group == half)(functools.partial(compute, half))

    @pl.when(group == MEMORY_GROUP)
    def _memory():
        plgpu.set_max_registers(launch.MEMORY_REGISTERS, action="decrease")

        @pl.loop(0, places.count(program))
        def _block(i):
            row, k, block = places.of(program, i)

            @pl.loop(0, TILES)
            def _tile(r):
                tile, start = i * TILES + r, block * BLOCK + r * ROWS
                step = tile * steps
                ring.fill(step, key_tile(key, row, start - p.offset, k))
                value_ring.fill(tile, key_tile(value, row, start - p.offset, k))

                @pl.when(r == 0)
                def _of_block():
                    state_ring.fill(i, *(states.at[row, k, block, half] for half in range(2)))

                @pl.loop(0, p.shared)
                def _head(j):
                    ring.fill(step + 1 + j, query.at[row, pl.ds(start, ROWS), k * p.shared + j])


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
            *launch.ring_types(STAGES, (ROWS, H), dtype, consumers=COMPUTE_GROUPS),
            *launch.ring_types(1, (2, H, H), dtype, consumers=COMPUTE_GROUPS),
            *launch.ring_types(VALUE_STAGES, (ROWS, H), dtype, consumers=COMPUTE_GROUPS),
            *sum_types(STAGES),
            launch.tiled((2, ROWS, H), dtype),
        ),
    )(query, key, value, states)
