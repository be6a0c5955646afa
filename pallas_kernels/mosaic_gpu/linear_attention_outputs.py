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
    key_start,
    key_tile,
    seen,
    store_key_features,
    sum_types,
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
    steps = TILES * (1 + p.shared)  # of a block: its keys, then the tiles of each query head
    program, group = lax.axis_index("program"), lax.axis_index("group")

    def compute(half):
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")
        key_features = features.at[half]

        @pl.loop(0, places.count(program))
        def _block(i):
            row, k, block = places.of(program, i)
            store_key_features(p, ring, i * steps, block, half, key_features)
            state, values = state_ring.wait(i).at[half], value_ring.wait(i)

            @pl.loop(0, p.shared)
            def _head(j):
                for r in range(TILES):
                    step = i * steps + TILES * (1 + j) + r
                    queries = half_features(sums.load(step, half), half, softmax=p.softmax).astype(tiles.dtype)
                    if r > 0:
                        sums.release(step - 1, half)
                    else:
                        pl.when(j > 0)(lambda step=step: sums.release(step - 1, half))

                    def products(acc, *scores, queries=queries, r=r):
                        for s in range(r + 1):  # the tile of keys beside the queries first
                            plgpu.wgmma(scores[s], queries, plgpu.transpose_ref(key_features.at[r - s], (1, 0)))
                        plgpu.wgmma(acc, queries, state)
                        for s in range(r + 1):
                            found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores[s], wait_n=r + 1))
                            found = found if s else seen(p, found, query_axis=0)
                            plgpu.wgmma(acc, found.astype(queries.dtype), values.at[r - s])
                        return acc[...]

                    scores = (plgpu.ACC((ROWS, ROWS), jnp.float32),) * (r + 1)
                    acc = pl.run_scoped(products, plgpu.ACC((ROWS, p.head_dim), jnp.float32), *scores)
                    target = out.at[row, pl.ds(block * BLOCK + r * ROWS, ROWS), k * p.shared + j]
                    sums.store(step, half, acc, target)

            state_ring.release(i)
            value_ring.release(i)
            sums.release((i + 1) * steps - 1, half)

        plgpu.wait_smem_to_gmem(0)

    for half in range(2):
        pl.when(group == half)(functools.partial(compute, half))

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
                for r in range(TILES):
                    at = row, pl.ds(block * BLOCK + r * ROWS, ROWS), k * p.shared + j
                    ring.fill(i * steps + TILES * (1 + j) + r, query.at[at])

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
            *launch.ring_types(STAGES, (ROWS, H), dtype, consumers=COMPUTE_GROUPS),
            *launch.ring_types(1, (2, H, H), dtype, consumers=COMPUTE_GROUPS),
            *launch.ring_types(1, (TILES, ROWS, H), dtype, consumers=COMPUTE_GROUPS),
            *sum_types(STAGES),
            launch.tiled((2, TILES, ROWS, H), dtype),
        ),
    )(query, key, value, states)
