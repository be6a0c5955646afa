"""Gradients of queries: d_phi(q) = d_out S_c^T + tril(d_out v^T) phi(k) for tokens after a place that S_c enters."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.sizes import ROWS
from pallas_kernels.linear_attention.mosaic_gpu_blocks import Places, seen
from pallas_kernels.linear_attention.mosaic_gpu_features import half_weights, pull_back
from pallas_kernels.linear_attention.mosaic_gpu_loop import run_tiles, tile_types
from pallas_kernels.linear_attention.mosaic_gpu_tiling import Tiling


def linear_attention_queries_mosaic(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    states,  # [B, K, C, 2, H, H]: the sum that enters each block
    d_query,  # [B, T, N, H]
    *scratch,
    tiling: Tiling,
    places: Places,
):
    """Each head of a tile: the gradient of one half of the features, then that of the queries through it."""
    accumulators = plgpu.ACC((ROWS, tiling.shape.head_dim), jnp.float32), plgpu.ACC((ROWS, ROWS), jnp.float32)

    def add_head(sums, half, step, aligned, at, release):
        do = sums.ring.wait(step)

        def products(acc, scores):
            plgpu.wgmma(scores, do, aligned.values.transpose((1, 0)))
            plgpu.wgmma(acc, do, aligned.state.transpose((1, 0)))
            found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            plgpu.wgmma(acc, seen(tiling, found, query_axis=0).astype(do.dtype), aligned.features)
            return half_weights(sums.load(step + 1, half), half, softmax=tiling.shape.softmax), acc[...]

        weights, acc = pl.run_scoped(products, *accumulators)
        sums.ring.release(step)
        release()
        part = pull_back(weights, acc, softmax=tiling.shape.softmax)
        sums.store(step + 1, half, -part if half else part, d_query.at[at])

    run_tiles(tiling, places, key, value, states, (d_out, query), scratch, add_head)


def queries_gradient(
    tiling: Tiling, query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, states: jax.Array
) -> jax.Array:
    """d_query [B, T, N, H]; `states` are those of `linear_attention_sums.running_sums`."""
    places = Places(tiling.shape.batch, tiling.blocks, tiling.shape.key_heads)
    return launch.kernel(
        functools.partial(linear_attention_queries_mosaic, tiling=tiling, places=places),
        name=linear_attention_queries_mosaic.__name__,
        programs=places.programs,
        out_type=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch_types=tile_types(tiling),
    )(query, key, value, d_out, states)
