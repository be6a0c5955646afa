"""Gradients of a tile of keys and values.

With G_c, the sum of phi(q)^T d_out after the tile of queries aligned with that of keys,

    d_v = phi(k) G_c + tril(phi(q) phi(k)^T)^T d_out,   d_phi(k) = v G_c^T + tril(d_out v^T)^T phi(q).

One warpgroup has the first equation and one the second, with as many products; the third makes the features of queries.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.sizes import ROWS, cdiv
from pallas_kernels.linear_attention.mosaic_gpu_blocks import Places, key_tile, real_keys, seen
from pallas_kernels.linear_attention.mosaic_gpu_features import half_features, pull_back
from pallas_kernels.linear_attention.mosaic_gpu_tiling import Tiling

VALUES, KEYS, FEATURES = range(3)  # warpgroups; the first two make half 0 and half 1 of the features of keys
REGISTERS = (144, 232, 128)  # of their threads
RAW_STAGES, FEATURE_STAGES, D_OUT_STAGES = 2, 3, 2  # tiles of queries, halves of their features, tiles of d_out


def linear_attention_keys_mosaic(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    d_states,  # [B, K, c, 2, H, H]: the reverse sum that enters each tile of queries
    d_key,  # [B, T, K, H]
    d_value,  # [B, T, K, H]
    raw,
    queries_filled,
    keys_filled,
    keys_consumed,
    d_out_tiles,
    d_out_filled,
    d_out_consumed,
    value_tiles,
    value_filled,
    value_consumed,
    state_tiles,
    state_filled,
    state_consumed,
    query_features,
    features_filled,
    features_consumed,
    key_features,
    keys_stored,
    keys_read,
    *,
    tiling: Tiling,
    places: Places,
):
    """One program goes through tiles of keys, and the queries aligned with each, of all heads that share it."""
    d_out_ring = launch.Ring(d_out_tiles, d_out_filled, d_out_consumed)
    value_ring = launch.Ring(value_tiles, value_filled, value_consumed)
    state_ring = launch.Ring(state_tiles, state_filled, state_consumed)
    feature_ring = launch.Ring(query_features, features_filled, features_consumed)
    program, group = lax.axis_index("program"), lax.axis_index("group")
    count = places.count(program)

    def place(tile):
        """Row, key head and first key of a program's tile; the number of queries' tiles beside it."""
        row, k, place = places.of(program, tile)
        return (
            row,
            k,
            place * ROWS,
            jnp.where(place * ROWS + tiling.offset < tiling.shape.tokens, tiling.shape.heads_per_key, 0),
        )

    def compute(role, begin, add_queries, finish, gradient):
        """The loop over tiles of one role; `pair` counts the tiles of queries so far, of all tiles of keys."""
        plgpu.set_max_registers(
            REGISTERS[role], action="increase" if REGISTERS[role] > launch.LAUNCH_REGISTERS else "decrease"
        )

        def add_tile(tile, pair):
            row, k, start, readers = place(tile)
            plgpu.barrier_wait(keys_filled)
            keys = raw.at[lax.rem(pair + tile, RAW_STAGES)][...]
            found = half_features(keys, role, softmax=tiling.shape.softmax, real=real_keys(tiling, start))
            plgpu.barrier_arrive(keys_consumed)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the last gradient, from the same memory
            key_features[role] = found.astype(key_features.dtype)
            plgpu.commit_smem()
            launch.meet(keys_stored)
            carry = begin(tile, state_ring.wait(tile))
            state_ring.release(tile)
            carry = lax.fori_loop(pair, pair + readers, functools.partial(add_queries, tile), carry)
            found = finish(tile, carry)
            launch.meet(keys_read)
            key_features[role] = found.astype(key_features.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(key_features.at[role], key_tile(gradient, row, start, k))
            return pair + readers

        lax.fori_loop(0, count, add_tile, 0)
        plgpu.wait_smem_to_gmem(0)

    def weights_of(products):
        """Scores of a tile of keys and one of queries, rounded."""

        def run(scores):
            products(scores)
            return scores[...]

        found = pl.run_scoped(run, plgpu.ACC((ROWS, ROWS), jnp.float32))
        return seen(tiling, found, query_axis=1).astype(raw.dtype)

    accumulator = plgpu.ACC((ROWS, tiling.shape.head_dim), jnp.float32)

    @pl.when(group == VALUES)
    def _values():
        def begin(tile, state):
            def products(d_v):
                for half in range(2):
                    plgpu.wgmma(d_v, key_features.at[half], state.at[half])
                return d_v[...]

            return pl.run_scoped(products, accumulator)

        def add_queries(tile, n, d_v):
            def products(scores):
                for half in range(2):
                    queries = feature_ring.wait(2 * n + half)
                    plgpu.wgmma(scores, key_features.at[half], queries.transpose((1, 0)))

            weights = weights_of(products)
            for half in range(2):
                feature_ring.release(2 * n + half)
            do = d_out_ring.wait(n)
            d_v = pl.run_state(lambda ref: plgpu.wgmma(ref, weights, do))(plgpu.ACC.init(d_v))
            d_out_ring.release(n)
            return d_v

        compute(VALUES, begin, add_queries, lambda tile, d_v: d_v, d_value)

    @pl.when(group == KEYS)
    def _keys():
        def begin(tile, state):
            values = value_ring.wait(tile)

            def products(*d_halves):
                for half in range(2):
                    plgpu.wgmma(d_halves[half], values, state.at[half].transpose((1, 0)))
                return tuple(d_half[...] for d_half in d_halves)

            return pl.run_scoped(products, accumulator, accumulator)

        def add_queries(tile, n, d_halves):
            values, do = value_tiles.at[0], d_out_ring.wait(n)
            weights = weights_of(lambda scores: plgpu.wgmma(scores, values, do.transpose((1, 0))))
            d_out_ring.release(n)

            def products(refs):
                for half in range(2):
                    plgpu.wgmma(refs[half], weights, feature_ring.wait(2 * n + half))

            d_halves = pl.run_state(products)(tuple(map(plgpu.ACC.init, d_halves)))
            for half in range(2):
                feature_ring.release(2 * n + half)
            return tuple(d_halves)

        def finish(tile, d_halves):
            value_ring.release(tile)
            parts = []
            for half in range(2):
                if half:
                    plgpu.commit_smem()  # keeps the compiler from working on both at once, which spills registers
                # Features that were rounded serve as weights, whose sum is 1 but for the rounding.
                found = key_features[half].astype(jnp.float32)
                parts.append(pull_back(found, d_halves[half], softmax=tiling.shape.softmax))
            return parts[0] - parts[1]

        compute(KEYS, begin, add_queries, finish, d_key)

    @pl.when(group == FEATURES)
    def _features():
        plgpu.set_max_registers(REGISTERS[FEATURES], action="decrease")

        def fill_state(tile):
            row, k, start, _ = place(tile)
            source = d_states.at[row, k, jnp.minimum(lax.div(start + tiling.offset, ROWS), d_states.shape[2] - 1)]
            state_ring.fill(tile, *(source.at[half] for half in range(2)))

        def fill_tile(tile, pair):
            row, k, start, readers = place(tile)

            def stage_of(n):
                """Of the n-th tile of queries; the tile of keys precedes them."""
                return lax.rem(pair + tile + 1 + n, RAW_STAGES)

            def at(n):
                return row, pl.ds(start + tiling.offset, ROWS), k * tiling.shape.heads_per_key + n

            def fill_query(n):
                plgpu.copy_gmem_to_smem(query.at[at(n)], raw.at[stage_of(n)], queries_filled.at[stage_of(n)])

            def store_features(n):
                plgpu.barrier_wait(queries_filled.at[stage_of(n)])
                for half in range(2):
                    found = half_features(raw.at[stage_of(n)][...], half, softmax=tiling.shape.softmax)
                    feature_ring.put(2 * (pair + n) + half, found.astype(raw.dtype))

            plgpu.copy_gmem_to_smem(key_tile(key, row, start, k), raw.at[stage_of(-1)], keys_filled)
            pl.when(tile == 0)(lambda: fill_state(0))

            @pl.when(readers > 0)
            def _ahead():
                fill_query(0)
                d_out_ring.fill(pair, d_out.at[at(0)])
                store_features(0)

            value_ring.fill(tile, key_tile(value, row, start, k))
            plgpu.barrier_wait(keys_consumed)
            pl.when(readers > 1)(lambda: fill_query(1))

            @pl.loop(1, readers)
            def _queries(n):
                d_out_ring.fill(pair + n, d_out.at[at(n)])
                pl.when(n + 1 < readers)(lambda: fill_query(n + 1))
                store_features(n)
                pl.when((n == 1) & (tile + 1 < count))(lambda: fill_state(tile + 1))

            pl.when((readers < 2) & (tile + 1 < count))(lambda: fill_state(tile + 1))
            return pair + readers

        lax.fori_loop(0, count, fill_tile, 0)


def keys_gradients(
    tiling: Tiling, query: jax.Array, key: jax.Array, value: jax.Array, d_out: jax.Array, d_states: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """d_key and d_value [B, T, K, H]; `d_states` are those of `linear_attention_sums.running_sums` in reverse."""
    dtype, H = jnp.dtype(tiling.shape.dtype), tiling.shape.head_dim
    places = Places(tiling.shape.batch, cdiv(tiling.shape.tokens, ROWS), tiling.shape.key_heads)
    shape = jax.ShapeDtypeStruct(key.shape, dtype)
    both = plgpu.Barrier(num_arrivals=2)
    return launch.kernel(
        functools.partial(linear_attention_keys_mosaic, tiling=tiling, places=places),
        name=linear_attention_keys_mosaic.__name__,
        programs=places.programs,
        out_type=(shape, shape),
        scratch_types=(
            launch.tiled((RAW_STAGES, ROWS, H), dtype),
            plgpu.Barrier(num_barriers=RAW_STAGES),
            plgpu.Barrier(),
            both,
            *launch.ring_types(D_OUT_STAGES, (ROWS, H), dtype, consumers=2),
            *launch.ring_types(1, (ROWS, H), dtype, consumers=1),
            *launch.ring_types(1, (2, H, H), dtype, consumers=2),
            *launch.ring_types(FEATURE_STAGES, (ROWS, H), dtype, consumers=2),
            launch.tiled((2, ROWS, H), dtype),
            both,
            both,
        ),
    )(query, key, value, d_out, d_states)
