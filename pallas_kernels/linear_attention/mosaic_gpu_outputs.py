"""What queries read: out = phi(q) S_c + tril(phi(q) phi(k)^T) v for tokens after a place that S_c enters."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.sizes import ROWS
from pallas_kernels.linear_attention.mosaic_gpu_blocks import Places, seen
from pallas_kernels.linear_attention.mosaic_gpu_features import by_rows, half_weights, scales
from pallas_kernels.linear_attention.mosaic_gpu_loop import run_tiles, tile_types
from pallas_kernels.linear_attention.mosaic_gpu_tiling import Tiling


def linear_attention_outputs_mosaic(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    states,  # [B, K, C, 2, H, H]: the sum that enters each block
    out,  # [B, T, N, H]
    *scratch,
    tiling: Tiling,
    places: Places,
):
    """Each head of a tile: features of queries stay in registers, and are divided by their sum at the end."""
    accumulators = plgpu.ACC((ROWS, tiling.shape.head_dim), jnp.float32), plgpu.ACC((ROWS, ROWS), jnp.float32)

    def add_head(sums, half, step, aligned, at, release):
        weights = half_weights(sums.load(step, half), half, softmax=tiling.shape.softmax)
        queries, scale = weights.astype(out.dtype), scales(weights, softmax=tiling.shape.softmax)
        release()

        def products(acc, scores):
            plgpu.wgmma(scores, queries, aligned.features.transpose((1, 0)))
            plgpu.wgmma(acc, queries, aligned.state)
            found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            plgpu.wgmma(acc, seen(tiling, found, query_axis=0).astype(queries.dtype), aligned.values)
            return acc[...]

        acc = pl.run_scoped(products, *accumulators)
        sums.store(step, half, acc if scale is None else acc * by_rows(scale, acc), out.at[at])

    run_tiles(tiling, places, key, value, states, (query,), scratch, add_head)


def outputs(tiling: Tiling, query: jax.Array, key: jax.Array, value: jax.Array, states: jax.Array) -> jax.Array:
    """What the queries read, [B, T, N, H]; `states` are those of `linear_attention_sums.running_sums`."""
    places = Places(tiling.shape.batch, tiling.blocks, tiling.shape.key_heads)
    return launch.kernel(
        functools.partial(linear_attention_outputs_mosaic, tiling=tiling, places=places),
        name=linear_attention_outputs_mosaic.__name__,
        programs=places.programs,
        out_type=jax.ShapeDtypeStruct(query.shape, query.dtype),
        scratch_types=tile_types(tiling),
    )(query, key, value, states)
