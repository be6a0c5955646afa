"""Gradients of queries: d_phi(q) = d_out S_c^T + tril(d_out v^T) phi(k) for tokens after a place that S_c enters."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.sizes import LOG2_E, ROWS
from pallas_kernels.linear_attention.mosaic_gpu_blocks import Places, seen
from pallas_kernels.linear_attention.mosaic_gpu_features import half_weights_and_shift, pull_back
from pallas_kernels.linear_attention.mosaic_gpu_loop import run_tiles, tile_types
from pallas_kernels.linear_attention.mosaic_gpu_tiling import BLOCK, Tiling


def linear_attention_queries_mosaic(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    states,  # [B, K, C, 2, H, H]: the sum that enters each block
    d_query,  # [B, T, N, H]
    *rest,  # where features are softmaxes, the logs of queries and keys, [B, N, 2, T'], [B, K, 2, T']; scratch
    tiling: Tiling,
    places: Places,
):
    """Each head of a tile: the gradient of one half of the features, then that of the queries through it.

    The logs of sums of exponentials cost little here and spare `linear_attention_keys` the sums.
    """
    softmax = tiling.shape.softmax
    query_logs, key_logs, *scratch = rest if softmax else (None, None, *rest)
    accumulators = plgpu.ACC((ROWS, tiling.shape.head_dim), jnp.float32), plgpu.ACC((ROWS, ROWS), jnp.float32)

    def add_head(sums, half, step, aligned, at, release):
        do = sums.ring.wait(step)

        def products(acc, scores):
            plgpu.wgmma(scores, do, aligned.values.transpose((1, 0)))
            plgpu.wgmma(acc, do, aligned.state.transpose((1, 0)))
            found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1))
            plgpu.wgmma(acc, seen(tiling, found, query_axis=0).astype(do.dtype), aligned.features)
            return half_weights_and_shift(sums.load(step + 1, half), half, softmax=softmax), acc[...]

        (weights, shift), acc = pl.run_scoped(products, *accumulators)
        sums.ring.release(step)
        release()
        total = jnp.sum(weights, axis=1) if softmax else None
        if softmax:
            row, of_tile, n = at
            query_logs.at[row, n, half, of_tile][...] = shift + jnp.log(total) * LOG2_E
        part = pull_back(weights, acc, softmax=softmax, total=total)
        sums.store(step + 1, half, -part if half else part, d_query.at[at])

    def store_key_logs(half, row, k, start, logs):
        key_logs.at[row, k, half, pl.ds(start, ROWS)][...] = logs

    kept = store_key_logs if softmax else None
    run_tiles(tiling, places, key, value, states, (d_out, query), scratch, add_head, kept)


def queries_gradient(
    tiling: Tiling, query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, states: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """d_query [B, T, N, H]; logs of the sums of exponentials of both halves, which `keys_gradients` takes.

    `states` are those of `linear_attention_sums.running_sums`. Where features are softmaxes there are logs of queries
    [B, N, 2, T'] and keys [B, K, 2, T'], of whole tiles, in float32; of keys those that some query sees.
    """
    places = Places(tiling.shape.batch, tiling.blocks, tiling.shape.key_heads)
    shape = tiling.shape
    logs = [
        jax.ShapeDtypeStruct((shape.batch, heads, 2, tiling.blocks * BLOCK), jnp.float32)
        for heads in (shape.num_heads, shape.key_heads)
    ]
    d_query, *logs = launch.kernel(
        functools.partial(linear_attention_queries_mosaic, tiling=tiling, places=places),
        name=linear_attention_queries_mosaic.__name__,
        programs=places.programs,
        out_type=(jax.ShapeDtypeStruct(query.shape, query.dtype), *(logs if shape.softmax else ())),
        scratch_types=tile_types(tiling),
    )(query, key, value, d_out, states)
    return d_query, tuple(logs)
