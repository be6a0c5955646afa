"""Gradients of keys and values beside a block of queries, with G_c, the sum of phi(q)^T d_out after the block:

    d_v = phi(k) G_c + tril(phi(q) phi(k)^T)^T d_out,   d_phi(k) = v G_c^T + tril(d_out v^T)^T phi(q).

Each of the two warpgroups that compute has one half of the features of keys and queries, and so a part of d_v; the
parts are added up once a tile of keys.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic_gpu import launch
from pallas_kernels.mosaic_gpu.launch import COMPUTE_GROUPS, MEMORY_GROUP, ROWS
from pallas_kernels.mosaic_gpu.linear_attention_blocks import Places, key_start, key_tile, meet, real_keys, seen
from pallas_kernels.mosaic_gpu.linear_attention_features import half_features, pull_back
from pallas_kernels.mosaic_gpu.linear_attention_problem import BLOCK, TILES, LinearProblem

STAGES = 2  # tiles of queries, of d_out and of values in flight


def linear_attention_keys_mosaic(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    d_states,  # [B, K, C, 2, H, H]: the reverse sum that enters each block
    d_key,  # [B, T, K, H]
    d_value,  # [B, T, K, H]
    tiles,
    filled,
    consumed,
    d_out_tiles,
    d_out_filled,
    d_out_consumed,
    value_tiles,
    value_filled,
    value_consumed,
    state_tiles,
    state_filled,
    state_consumed,
    key_features,
    query_features,
    parts_stored,
    parts_read,
    *,
    p: LinearProblem,
    places: Places,
):
    """One program goes through blocks of a key head: for each tile of keys, the queries of the block from it on."""
    ring = launch.Ring(tiles, filled, consumed)  # a tile of keys, those of the queries that see it, the keys again
    d_out_ring = launch.Ring(d_out_tiles, d_out_filled, d_out_consumed)
    value_ring = launch.Ring(value_tiles, value_filled, value_consumed)
    state_ring = launch.Ring(state_tiles, state_filled, state_consumed)
    first_block = p.offset // BLOCK
    program, group = lax.axis_index("program"), lax.axis_index("group")

    def place(i):
        row, k, block = places.of(program, i)
        return row, k, first_block + block

    def readers(block, r):
        """Tiles of queries, of all heads, that see some key of tile r."""
        return jnp.where(block < p.blocks, (TILES - r) * p.shared, 0)

    @pl.when(group < COMPUTE_GROUPS)
    def _compute():
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")
        sign = (1 - 2 * group).astype(jnp.float32)
        of_keys, of_queries = key_features.at[group], query_features.at[group]

        def add_block(i, counts):
            row, k, block = place(i)
            state = state_ring.wait(i).at[group]

            def add_tile(r, counts):
                step, d_out_step, value_step = counts
                start, count = key_start(p, block, r), readers(block, r)
                last = step + 1 + count

                def features_of(step):
                    tile = ring.wait(step)[...]
                    ring.release(step)
                    return half_features(tile, sign, softmax=p.softmax, real=real_keys(p, start))

                of_keys[...] = features_of(step).astype(of_keys.dtype)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the last tile, from the queries' memory
                plgpu.commit_smem()
                values = value_ring.wait(value_step)

                def begin(d_v, d_half):
                    plgpu.wgmma(d_v, of_keys, state)
                    plgpu.wgmma(d_half, values, plgpu.transpose_ref(state, (1, 0)))
                    return d_v[...], d_half[...]

                accumulator = plgpu.ACC((ROWS, p.head_dim), jnp.float32)
                carry = pl.run_scoped(begin, accumulator, accumulator)
                pl.when(r == TILES - 1)(lambda: state_ring.release(i))

                def add_queries(n, carry):
                    tile = ring.wait(step + 1 + n)
                    of_queries[...] = half_features(tile[...], sign, softmax=p.softmax).astype(of_queries.dtype)
                    ring.release(step + 1 + n)
                    plgpu.commit_smem()
                    do = d_out_ring.wait(d_out_step + n)
                    queries = r + lax.div(n, p.shared)

                    def products(refs):
                        scores, d_scores, d_v, d_half = refs
                        plgpu.wgmma(scores, of_keys, plgpu.transpose_ref(of_queries, (1, 0)))
                        plgpu.wgmma(d_scores, values, plgpu.transpose_ref(do, (1, 0)))
                        for ref, acc, right in ((scores, d_v, do), (d_scores, d_half, of_queries)):
                            found = lax.optimization_barrier(plgpu.wgmma_accumulator_load(ref, wait_n=1))
                            found = seen(p, found, queries, r, query_axis=1)
                            plgpu.wgmma(acc, found.astype(right.dtype), right)

                    zeros = launch.zeros((ROWS, ROWS))
                    _, _, *carry = pl.run_state(products)(tuple(map(plgpu.ACC.init, (zeros, zeros, *carry))))
                    d_out_ring.release(d_out_step + n)
                    return tuple(carry)

                d_v, d_half = lax.fori_loop(0, count, add_queries, carry)
                value_ring.release(value_step)
                d_k = pull_back(features_of(last), d_half, softmax=p.softmax) * sign

                # The first group adds up d_k and the second d_v; two numbers of 16 bits carry what the other adds.
                mine, others = jnp.where(group == 0, d_k, d_v), jnp.where(group == 0, d_v, d_k)
                rounded = others.astype(of_keys.dtype)
                of_keys[...] = rounded
                of_queries[...] = (others - rounded.astype(jnp.float32)).astype(of_queries.dtype)
                plgpu.commit_smem()
                meet(parts_stored)
                for part in (key_features, query_features):
                    mine += part.at[1 - group][...].astype(jnp.float32)
                meet(parts_read)
                of_queries[...] = mine.astype(of_queries.dtype)
                plgpu.commit_smem()
                for g, gradient in enumerate((d_key, d_value)):

                    @pl.when((group == g) & (start >= 0))
                    def _store(gradient=gradient):
                        plgpu.copy_smem_to_gmem(of_queries, key_tile(gradient, row, start, k))

                return last + 1, d_out_step + count, value_step + 1

            return lax.fori_loop(0, TILES, add_tile, counts)

        lax.fori_loop(0, places.count(program), add_block, (0, 0, 0))
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == MEMORY_GROUP)
    def _memory():
        plgpu.set_max_registers(launch.MEMORY_REGISTERS, action="decrease")

        def fill_block(i, counts):
            row, k, block = place(i)

            def fill_tile(r, counts):
                step, d_out_step, value_step = counts
                start, count = key_start(p, block, r), readers(block, r)
                ring.fill(step, key_tile(key, row, start, k))
                value_ring.fill(value_step, key_tile(value, row, start, k))

                @pl.when(r == 0)
                def _of_block():
                    source = d_states.at[row, k, jnp.minimum(block, p.blocks - 1)]
                    state_ring.fill(i, *(source.at[half] for half in range(2)))

                @pl.loop(0, count)
                def _queries(n):
                    at = pl.ds(block * BLOCK + (r + lax.div(n, p.shared)) * ROWS, ROWS)
                    head = k * p.shared + lax.rem(n, p.shared)
                    ring.fill(step + 1 + n, query.at[row, at, head])
                    d_out_ring.fill(d_out_step + n, d_out.at[row, at, head])

                ring.fill(step + 1 + count, key_tile(key, row, start, k))
                return step + 2 + count, d_out_step + count, value_step + 1

            return lax.fori_loop(0, TILES, fill_tile, counts)

        lax.fori_loop(0, places.count(program), fill_block, (0, 0, 0))


def keys_gradients(
    p: LinearProblem, query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, d_states: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """d_key and d_value [B, T, K, H]; `d_states` are those of `linear_attention_sums.running_sums` in reverse."""
    dtype, H = jnp.dtype(p.dtype), p.head_dim
    places = Places(p.batch, p.key_blocks - p.offset // BLOCK, p.key_heads)
    shape = jax.ShapeDtypeStruct(key.shape, dtype)
    ring = launch.ring_types(STAGES, (ROWS, H), dtype, consumers=COMPUTE_GROUPS)
    return launch.kernel(
        functools.partial(linear_attention_keys_mosaic, p=p, places=places),
        name=linear_attention_keys_mosaic.__name__,
        programs=places.programs,
        out_type=(shape, shape),
        scratch_types=(
            *ring,
            *ring,
            *ring,
            *launch.ring_types(1, (2, H, H), dtype, consumers=COMPUTE_GROUPS),
            launch.tiled((COMPUTE_GROUPS, ROWS, H), dtype),
            launch.tiled((COMPUTE_GROUPS, ROWS, H), dtype),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
        ),
    )(query, key, value, d_out, d_states)
