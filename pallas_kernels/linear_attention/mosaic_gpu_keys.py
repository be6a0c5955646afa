"""Gradients of keys and values, and the reverse sums that they need, in one pass over the queries of a row.

With G_c, the sum of phi(q)^T d_out after the tile of queries aligned with that of keys,

    d_v = phi(k) G_c + tril(phi(q) phi(k)^T)^T d_out,   d_phi(k) = v G_c^T + tril(d_out v^T)^T phi(q).

Two programs of a cluster have one half of the features each, and that half of G_c in registers, so that it is never in
memory. Tile by tile, from the last one on, they exchange their parts of a result: the first program adds up d_v and the
second one d_k. Of a program's warpgroups one has the first equation, one the second and one the sum; the fourth makes
features.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.sizes import ROWS, cdiv
from pallas_kernels.linear_attention.mosaic_gpu_blocks import key_tile, real_keys, seen
from pallas_kernels.linear_attention.mosaic_gpu_features import by_rows, features_by_logs, pull_back
from pallas_kernels.linear_attention.mosaic_gpu_tiling import TILES, Tiling

HALF = "half"  # the axis of a cluster
VALUES, KEYS, STATES, FEATURES = GROUPS = range(4)  # warpgroups
REGISTERS = (136, 144, 160, 72)  # of their threads
LAUNCH_REGISTERS = 128
RAW_STAGES, D_OUT_STAGES, FEATURE_STAGES, KEY_STAGES, VALUE_STAGES = 2, 3, 2, 2, 2  # tiles


def linear_attention_keys_mosaic(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    entering,  # [B, K, segments, 2 H, H] float32: the reverse sum that enters each segment
    query_logs,  # [B, N, 2, T'] float32, of `queries_gradient`, where features are softmaxes; else a placeholder
    key_logs,  # [B, K, 2, T'] float32; as `query_logs`
    d_key,  # [B, T, K, H]
    d_value,  # [B, T, K, H]
    raw,
    raw_filled,
    d_out_tiles,
    d_out_filled,
    d_out_consumed,
    query_features,
    features_filled,
    features_consumed,
    key_features,
    keys_stored,
    keys_consumed,
    keys_copied,
    value_tiles,
    value_filled,
    value_consumed,
    state_tiles,
    state_filled,
    state_consumed,
    part,
    part_filled,
    part_read,
    *,
    tiling: Tiling,
):
    """A cluster goes through the tiles of a segment with a key head, and through the queries of all heads with it.

    A segment is one of tiles of queries. Those before the lag are aligned with no keys; in their places come the last
    keys, which no query sees.
    """
    d_out_ring = launch.Ring(d_out_tiles, d_out_filled, d_out_consumed)
    feature_ring = launch.Ring(query_features, features_filled, features_consumed)
    key_ring = launch.Ring(key_features, keys_stored, keys_consumed)
    value_ring = launch.Ring(value_tiles, value_filled, value_consumed)
    state_ring = launch.Ring(state_tiles, state_filled, state_consumed)
    H, heads, softmax = tiling.shape.head_dim, tiling.shape.heads_per_key, tiling.shape.softmax
    program, half, group = lax.axis_index("program"), lax.axis_index(HALF), lax.axis_index("group")
    k = lax.rem(program, tiling.shape.key_heads)
    program = lax.div(program, tiling.shape.key_heads)
    row, segment = lax.div(program, tiling.segments), lax.rem(program, tiling.segments)
    first, of_row, lag = segment * tiling.span * TILES, cdiv(tiling.shape.tokens, ROWS), tiling.offset // ROWS
    count = jnp.minimum(tiling.span * TILES, of_row - first)
    readers = count - jnp.clip(lag - first, 0, count)  # tiles that are aligned with queries
    sign = jnp.where(half == 0, 1.0, -1.0)

    def key_start(tile):
        """The first key of a segment's tile."""
        aligned = first + count - 1 - tile - lag
        return jnp.where(aligned >= 0, aligned, aligned + of_row) * ROWS

    def pairs(tile):
        """Tiles of queries beside one of keys, as numbers of all that the segment has."""
        return tile * heads, jnp.where(tile < readers, (tile + 1) * heads, tile * heads)

    def registers(role):
        more = REGISTERS[role] > LAUNCH_REGISTERS
        plgpu.set_max_registers(REGISTERS[role], action="increase" if more else "decrease")

    def product(a, b, shape=(ROWS, H)):
        def run(ref):
            plgpu.wgmma(ref, a, b)
            return ref[...]

        return pl.run_scoped(run, plgpu.ACC(shape, jnp.float32))

    def weights_of(a, b):
        """Scores of a tile of keys and one of queries, rounded."""
        return seen(tiling, product(a, b, (ROWS, ROWS)), query_axis=1).astype(raw.dtype)

    def add_product(total, a, b):
        return pl.run_state(lambda ref: plgpu.wgmma(ref, a, b))(plgpu.ACC.init(total))

    def free_part(role):
        """The part of the tile before is on its way to memory."""
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        plgpu.barrier_arrive(part_read.at[role])

    def exchange(role, found, gradient, tile):
        """Sends this program's part to the one that adds up, or adds it to the other's."""
        plgpu.barrier_wait(part_read.at[role])

        @pl.when(half != role)
        def _send():
            plgpu.async_store_smem(found.astype(part.dtype), part, part_filled, cluster_idx=role, cluster_dim=HALF)

        @pl.when(half == role)
        def _add():
            plgpu.barrier_wait(part_filled)
            part[...] = (found + part[...].astype(jnp.float32)).astype(part.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(part, key_tile(gradient, row, key_start(tile), k))

    @pl.when(group == VALUES)
    def _values():
        registers(VALUES)

        @pl.loop(0, count)
        def _tile(tile):
            keys, state = key_ring.wait(tile), state_ring.wait(tile)
            d_v = product(keys, state)
            state_ring.release(tile)
            free_part(VALUES)

            def add_queries(n, d_v):
                weights = weights_of(keys, feature_ring.wait(n).transpose((1, 0)))
                feature_ring.release(n)
                d_v = add_product(d_v, weights, d_out_ring.wait(n))
                d_out_ring.release(n)
                return d_v

            d_v = lax.fori_loop(*pairs(tile), add_queries, d_v)
            key_ring.release(tile)
            exchange(VALUES, d_v, d_value, tile)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == KEYS)
    def _keys():
        registers(KEYS)

        @pl.loop(0, count)
        def _tile(tile):
            values, state = value_ring.wait(tile), state_ring.wait(tile)
            d_phi = product(values, state.transpose((1, 0)))
            state_ring.release(tile)
            free_part(KEYS)

            def add_queries(n, d_phi):
                weights = weights_of(values, d_out_ring.wait(n).transpose((1, 0)))
                d_out_ring.release(n)
                d_phi = add_product(d_phi, weights, feature_ring.wait(n))
                feature_ring.release(n)
                return d_phi

            d_phi = lax.fori_loop(*pairs(tile), add_queries, d_phi)
            value_ring.release(tile)
            # Features that were rounded serve as weights, whose sum is 1 but for the rounding.
            found = pull_back(key_ring.wait(tile)[...].astype(jnp.float32), d_phi, softmax=softmax)
            key_ring.release(tile)
            exchange(KEYS, found * sign, d_key, tile)

        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == STATES)
    def _states():
        registers(STATES)

        def add_tile(tile, state):
            state_ring.put(tile, state.astype(raw.dtype))

            def add_queries(n, state):
                state = add_product(state, feature_ring.wait(n).transpose((1, 0)), d_out_ring.wait(n))
                feature_ring.release(n)
                d_out_ring.release(n)
                return state

            return lax.fori_loop(*pairs(tile), add_queries, state)

        lax.fori_loop(0, count, add_tile, launch.load_matrix(entering.at[row, k, segment, pl.ds(half * H, H)]))

    @pl.when(group == FEATURES)
    def _features():
        registers(FEATURES)
        total = readers * heads

        def at(n):
            start = (first + count - 1 - lax.div(n, heads)) * ROWS
            return row, pl.ds(start, ROWS), k * heads + lax.rem(n, heads)

        def fill_query(n):
            stage = lax.rem(n, RAW_STAGES)
            plgpu.copy_gmem_to_smem(query.at[at(n)], raw.at[stage], raw_filled.at[stage])

        def fill_keys(tile):
            stage, start = lax.rem(tile, KEY_STAGES), key_start(tile)
            pl.when(tile >= KEY_STAGES)(lambda: plgpu.barrier_wait(keys_consumed.at[stage]))
            plgpu.copy_gmem_to_smem(key_tile(key, row, start, k), key_features.at[stage], keys_copied.at[stage])
            value_ring.fill(tile, key_tile(value, row, start, k))

        fill_keys(0)

        @pl.when(total > 0)
        def _ahead():
            fill_query(0)
            d_out_ring.fill(0, d_out.at[at(0)])

        def logs_of(n):
            """Of the queries of a tile; they take long to come, so that they are asked for a tile ahead."""
            if not softmax:
                return ()
            of_row, tokens, head = at(jnp.maximum(jnp.minimum(n, total - 1), 0))
            return (launch.load_rows(query_logs.at[of_row, head, half, tokens], 1, optimized=False),)

        def add_tile(tile, logs):
            begin, end = pairs(tile)
            stage, start = lax.rem(tile, KEY_STAGES), key_start(tile)
            real, of_keys = real_keys(tiling, start), None
            if softmax:
                of_keys = launch.load_rows(key_logs.at[row, k, half, pl.ds(start, ROWS)], 1, optimized=False)
                of_keys = jnp.where(real, of_keys, jnp.inf)
            plgpu.barrier_wait(keys_copied.at[stage])
            found = features_by_logs(key_features.at[stage][...], sign, of_keys)
            if not softmax:
                found *= by_rows(jnp.where(real, 1.0, 0.0), found)
            key_features.at[stage][...] = found.astype(raw.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(keys_stored.at[stage])

            def add_queries(n, logs):
                stage, ahead = lax.rem(n, RAW_STAGES), logs_of(n + 1)

                @pl.when(n + 1 < total)
                def _next():
                    fill_query(n + 1)
                    d_out_ring.fill(n + 1, d_out.at[at(n + 1)])

                pl.when((n == end - 1) & (tile + 1 < count))(lambda: fill_keys(tile + 1))
                feature_ring.await_free(n)
                plgpu.barrier_wait(raw_filled.at[stage])
                found = features_by_logs(raw.at[stage][...], sign, *(logs if softmax else (None,)))
                feature_ring.store(n, found.astype(raw.dtype))
                return ahead

            logs = lax.fori_loop(begin, end, add_queries, logs)
            pl.when((begin == end) & (tile + 1 < count))(lambda: fill_keys(tile + 1))
            return logs

        lax.fori_loop(0, count, add_tile, logs_of(0))


def keys_gradients(
    tiling: Tiling,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    entering: jax.Array,
    logs: tuple[jax.Array, ...],
) -> tuple[jax.Array, jax.Array]:
    """d_key and d_value [B, T, K, H].

    `entering` is what `linear_attention_sums.entering_sums` gives in reverse, and `logs` are of `queries_gradient`.
    """
    dtype, H = jnp.dtype(tiling.shape.dtype), tiling.shape.head_dim
    shape = jax.ShapeDtypeStruct(key.shape, dtype)
    return launch.kernel(
        functools.partial(linear_attention_keys_mosaic, tiling=tiling),
        name=linear_attention_keys_mosaic.__name__,
        programs=tiling.shape.batch * tiling.shape.key_heads * tiling.segments,
        groups=len(GROUPS),
        cluster={HALF: 2},
        out_type=(shape, shape),
        scratch_types=(
            launch.tiled((RAW_STAGES, ROWS, H), dtype),
            plgpu.Barrier(num_barriers=RAW_STAGES),
            *launch.ring_types(D_OUT_STAGES, (ROWS, H), dtype, consumers=3),
            *launch.ring_types(FEATURE_STAGES, (ROWS, H), dtype, consumers=3),
            *launch.ring_types(KEY_STAGES, (ROWS, H), dtype, consumers=2),
            plgpu.Barrier(num_barriers=KEY_STAGES),
            *launch.ring_types(VALUE_STAGES, (ROWS, H), dtype, consumers=1),
            *launch.ring_types(1, (H, H), dtype, consumers=2),
            launch.tiled((ROWS, H), dtype),
            plgpu.Barrier(),
            plgpu.ClusterBarrier(collective_axes=(HALF,), num_barriers=2),
        ),
    )(query, key, value, d_out, entering, *(logs or 2 * [jnp.zeros((1, 1, 1, 1), jnp.float32)]))
