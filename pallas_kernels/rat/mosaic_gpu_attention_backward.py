"""The backward pass of the attention to summaries, from the log-sum-exp alone: the two kernels of the products.

With the names of `attention`, do the gradient of o, delta = do . o, and lse = log2 of the softmax's sum:

    p_tc = 2^(s_tc - lse_t),  ds_tc = p_tc (do_t . V_c - delta_t),  dV_c = sum p do,  dK_c = sum ds q,  dq_t = sum ds K.

The products accumulate onto -lse and -delta, so that neither is subtracted afterwards. Scores that all grow alike
change nothing, so sum_c ds_tc + ds_t = 0: the current score's gradient is minus that of the others.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.mosaic_gpu import COMPUTE_GROUPS, MEMORY_GROUP
from pallas_kernels.launch.sizes import ROWS
from pallas_kernels.rat.mosaic_gpu_mask import Seen, key_head, load_seen, tiles_of, token_sees_slot
from pallas_kernels.rat.mosaic_gpu_tiling import pad_seen, pad_summaries, pad_tokens, padded
from pallas_kernels.rat.seen_slots import SeenSlots, places, slot_tiles, token_tiles
from pallas_kernels.rat.shape import RatShape

# Measured for head_dim 128 in bfloat16 at 256, 1024 and 8192 slots a row.
QUERIES = 64  # tokens of a tile that the gradients of summaries are summed over
QUERY_STAGES = 4  # such tiles in flight
KEYS = 64  # summaries of a tile that the gradients of queries are summed over
KEY_STAGES = 3
HEADS = 2  # heads whose gradients are in shared memory at once: one is read ahead


def rat_summaries_backward_mosaic(
    d_heads,  # [B, T, N, H]
    delta,  # [B, N, T] float32
    lse,  # [B, N, T] float32
    queries,  # [B, T, G, H]
    keys,  # [B, C, N, H]; or fewer heads, which neighbouring heads share
    values,  # as keys
    first_slots,  # [B, T] int32, of packed documents; else a placeholder, as the next two
    end_slots,  # [B, T] int32
    bounds,  # [B, C / (COMPUTE_GROUPS ROWS), 4] int32, of `seen_slots.token_tiles`
    d_keys,  # as keys, float32 or of the dtype of keys
    d_values,  # likewise
    key_tiles,  # in which results of the dtype of keys are stored
    value_tiles,
    query_ring,
    d_head_ring,
    lse_ring,
    delta_ring,
    first_ring,
    end_ring,
    loaded,
    filled,
    consumed,
    *,
    shape: RatShape,
    order: launch.Order,
):
    """One program sums COMPUTE_GROUPS * ROWS summaries of a head over all tokens that see them, the last tokens first.

    Programs that run at the same time thus read the same tokens at the same time, whatever their first one is. Where
    heads share keys it does so for one of them after the other.
    """
    L, BQ, sharing = shape.chunk_size, QUERIES, shape.num_heads // keys.shape[2]
    block, row, key_head = order.place(lax.axis_index("program"))
    first_slot = block * (COMPUTE_GROUPS * ROWS)
    if shape.segmented:
        any_from, all_from, all_to, tiles = (bounds[row, block, i] for i in range(4))
        steps = tiles - any_from
    else:
        tiles = shape.tokens // BQ
        steps = jnp.maximum(tiles - lax.div((first_slot + 1) * L, BQ), 0)
    group = lax.axis_index("group")

    @pl.when(group < COMPUTE_GROUPS)
    def _compute():
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")
        slot = first_slot + group * ROWS
        k, v = key_tiles.at[group], value_tiles.at[group]
        mine = (row, pl.ds(slot, ROWS), key_head)
        plgpu.copy_gmem_to_smem(keys.at[mine], k, loaded.at[group])
        plgpu.copy_gmem_to_smem(values.at[mine], v, loaded.at[group])
        plgpu.barrier_wait(loaded.at[group])

        def stage_of(j, step):
            return lax.rem(step if sharing == 1 else j * steps + step, QUERY_STAGES)

        def add_tile(j, step, carry, masked):
            stage = stage_of(j, step)
            plgpu.barrier_wait(filled.at[stage])
            q, do = query_ring.at[stage], d_head_ring.at[stage]
            start = (tiles - 1 - step) * BQ

            def products(refs):
                scores, d_weights, d_k, d_v = refs
                plgpu.wgmma(scores, k, q.transpose((1, 0)))
                plgpu.wgmma(d_weights, v, do.transpose((1, 0)))
                weights = jnp.exp2(lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1)))
                if masked:
                    seen = None
                    if shape.segmented:
                        seen = Seen(*(launch.load_rows(ring.at[stage], 0) for ring in (first_ring, end_ring)))
                    is_seen = token_sees_slot(start, slot, (ROWS, BQ), L, seen, token_axis=1)
                    weights = jnp.where(is_seen, weights, 0.0)
                plgpu.wgmma(d_v, weights.astype(do.dtype), do)
                d_weights = lax.optimization_barrier(plgpu.wgmma_accumulator_load(d_weights, wait_n=1))
                plgpu.wgmma(d_k, (weights * d_weights).astype(q.dtype), q)

            minus_rows = [
                lax.broadcast_in_dim(-launch.load_rows(ring.at[stage], 0), (ROWS, BQ), [1])
                for ring in (lse_ring, delta_ring)
            ]
            *_, d_k, d_v = pl.run_state(products)(tuple(plgpu.ACC.init(x) for x in (*minus_rows, *carry)))
            plgpu.barrier_arrive(consumed.at[stage])
            return d_k, d_v

        carry = (launch.zeros((ROWS, shape.head_dim)), launch.zeros((ROWS, shape.head_dim)))
        # To which step some, and from which on some, and all, of this group's summaries are hidden.
        if shape.segmented:
            until, some, every = tiles - all_to, tiles - all_from, steps
        else:
            until = 0
            some = jnp.clip(tiles - launch.ceil_div((slot + ROWS) * L, BQ), 0, steps)
            every = jnp.clip(tiles - lax.div((slot + 1) * L, BQ), 0, steps)

        def add_head(j, carry):
            masked, whole = (functools.partial(add_tile, j, masked=masked) for masked in (True, False))
            if shape.segmented:
                carry = lax.fori_loop(0, until, masked, carry)
            carry = lax.fori_loop(until, some, whole, carry)
            carry = lax.fori_loop(some, every, masked, carry)

            @pl.loop(every, steps)
            def _pass(step):
                plgpu.barrier_wait(filled.at[stage_of(j, step)])
                plgpu.barrier_arrive(consumed.at[stage_of(j, step)])

            return carry

        d_k, d_v = add_head(0, carry) if sharing == 1 else lax.fori_loop(0, sharing, add_head, carry)
        to_natural = math.log(2)  # the queries carry log2(e)
        if d_keys.dtype == jnp.float32:
            d_keys.at[mine][...] = d_k * to_natural
            d_values.at[mine][...] = d_v
        else:
            k[...], v[...] = (d_k * to_natural).astype(k.dtype), d_v.astype(v.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k, d_keys.at[mine])
            plgpu.copy_smem_to_gmem(v, d_values.at[mine])
            plgpu.wait_smem_to_gmem(0)

    @pl.when(group == MEMORY_GROUP)
    def _memory():
        plgpu.set_max_registers(launch.MEMORY_REGISTERS, action="decrease")

        def fill(step):
            stage, n = lax.rem(step, QUERY_STAGES), key_head
            if sharing > 1:
                n, step = key_head * sharing + lax.div(step, steps), lax.rem(step, steps)
            at, g = pl.ds((tiles - 1 - step) * BQ, BQ), lax.rem(n, shape.num_groups)
            plgpu.copy_gmem_to_smem(queries.at[row, at, g], query_ring.at[stage], filled.at[stage])
            plgpu.copy_gmem_to_smem(lse.at[row, n, at], lse_ring.at[stage], filled.at[stage])
            plgpu.copy_gmem_to_smem(d_heads.at[row, at, n], d_head_ring.at[stage], filled.at[stage])
            plgpu.copy_gmem_to_smem(delta.at[row, n, at], delta_ring.at[stage], filled.at[stage])
            if shape.segmented:
                plgpu.copy_gmem_to_smem(first_slots.at[row, at], first_ring.at[stage], filled.at[stage])
                plgpu.copy_gmem_to_smem(end_slots.at[row, at], end_ring.at[stage], filled.at[stage])

        launch.produce(steps * sharing, QUERY_STAGES, (consumed, fill))


def summaries_gradients(shape: RatShape, d_heads, delta, lse, queries, keys, values, seen=None, *, rounded=False):
    """dK and dV of a call whose tokens and slots fill whole tiles, summed over the heads that share keys.

    They are float32 or, where they are to be `rounded`, of the dtype of `keys`.
    """
    dtype = jnp.dtype(shape.dtype)
    slots, key_heads = keys.shape[1:3]
    order = launch.Order(slots // (COMPUTE_GROUPS * ROWS), shape.batch, key_heads)
    bounds = places(seen, lambda seen: token_tiles(seen, COMPUTE_GROUPS * ROWS, order.blocks, QUERIES))
    bound_ring = (QUERY_STAGES if shape.segmented else 1, QUERIES)
    tile, ring = (COMPUTE_GROUPS, ROWS, shape.head_dim), (QUERY_STAGES, QUERIES, shape.head_dim)
    summaries = jax.ShapeDtypeStruct(keys.shape, dtype if rounded else jnp.float32)
    return launch.kernel(
        functools.partial(rat_summaries_backward_mosaic, shape=shape, order=order),
        name=rat_summaries_backward_mosaic.__name__,
        programs=order.programs,
        out_type=(summaries, summaries),
        scratch_types=(
            launch.tiled(tile, dtype),
            launch.tiled(tile, dtype),
            launch.tiled(ring, dtype),
            launch.tiled(ring, dtype),
            plgpu.SMEM((QUERY_STAGES, QUERIES), jnp.float32),
            plgpu.SMEM((QUERY_STAGES, QUERIES), jnp.float32),
            plgpu.SMEM(bound_ring, jnp.int32),
            plgpu.SMEM(bound_ring, jnp.int32),
            plgpu.Barrier(num_arrivals=2, num_barriers=COMPUTE_GROUPS),
            plgpu.Barrier(num_arrivals=6 if shape.segmented else 4, num_barriers=QUERY_STAGES),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=QUERY_STAGES),
        ),
    )(d_heads, delta, lse, queries, keys, values, *bounds)


def rat_queries_backward_mosaic(
    d_heads,  # [B, T, N, H]
    delta,  # [B, N, T] float32
    lse,  # [B, N, T] float32
    queries,  # [B, T, G, H]
    keys,  # [B, C, N, H]; or fewer heads, which neighbouring heads share
    values,  # as keys
    first_slots,  # [B, T] int32, of packed documents; else a placeholder, as the next two
    end_slots,  # [B, T] int32
    bounds,  # [B, T / (COMPUTE_GROUPS ROWS), 4] int32, of `seen_slots.slot_tiles`
    d_queries,  # [B, T, G, H] float32, or of the dtype of queries
    d_current_scores,  # [B, N, T] float32
    query_tiles,  # in which results of the dtype of queries are stored
    d_head_tiles,
    lse_rows,  # None if heads are gone through together, as the next and `queries_loaded`
    delta_rows,
    key_ring,
    value_ring,
    queries_loaded,
    head_loaded,
    filled,
    consumed,
    *,
    shape: RatShape,
    order: launch.Order,
    scale: float,
    together: int | None,
):
    """One program sums COMPUTE_GROUPS * ROWS tokens over the heads of a group, which share the query.

    Or, one after the other, of so many neighbouring heads `together` with queries of their own.
    """
    L, BK = shape.chunk_size, KEYS
    heads = together or shape.heads_per_group
    block, row, g = order.place(lax.axis_index("program"))
    first_token = (order.blocks - 1 - block) * (COMPUTE_GROUPS * ROWS)  # the last tokens see most
    group = lax.axis_index("group")
    first_tile, whole_from, whole_to, end_tile = tiles_of(shape, bounds, order, block, row, BK)
    tiles = end_tile - first_tile

    def head_of(j):
        return g * together + j if together else g + j * shape.num_groups

    @pl.when(group < COMPUTE_GROUPS)
    def _compute():
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")
        start = first_token + group * ROWS
        at = pl.ds(start, ROWS)
        q = query_tiles.at[group]
        if not together:
            plgpu.copy_gmem_to_smem(queries.at[row, at, g], q, queries_loaded.at[group])
        seen = load_seen(first_slots, end_slots, row, at) if shape.segmented else None

        def buffer_of(j):
            return lax.rem(j, HEADS) * COMPUTE_GROUPS + group

        def load_head(j):
            n = head_of(j)
            mine = buffer_of(j)
            plgpu.copy_gmem_to_smem(d_heads.at[row, at, n], d_head_tiles.at[mine], head_loaded.at[mine])
            if together:
                plgpu.copy_gmem_to_smem(queries.at[row, at, n], query_tiles.at[mine], head_loaded.at[mine])
                return
            plgpu.copy_gmem_to_smem(lse.at[row, n, at], lse_rows.at[mine], head_loaded.at[mine])
            plgpu.copy_gmem_to_smem(delta.at[row, n, at], delta_rows.at[mine], head_loaded.at[mine])

        load_head(jnp.int32(0))
        if not together:
            plgpu.barrier_wait(queries_loaded.at[group])

        def add_head(j, d_q, rows=None):
            """`rows` are lse and delta, which shared memory has where there is one query for all heads."""
            n = head_of(j)
            mine = buffer_of(j)
            pl.when(j + 1 < heads)(lambda: load_head(j + 1))
            plgpu.barrier_wait(head_loaded.at[mine])
            q_mine, do = query_tiles.at[mine] if together else q, d_head_tiles.at[mine]
            rows = rows or (launch.load_rows(rows.at[mine], 1) for rows in (lse_rows, delta_rows))
            minus_lse, minus_delta = (-x for x in rows)

            def add_tile(tile, carry, masked):
                d_q, total = carry
                stage = lax.rem(j * tiles + tile - first_tile, KEY_STAGES)
                plgpu.barrier_wait(filled.at[stage])
                k, v = key_ring.at[stage], value_ring.at[stage]

                def gradients(scores, d_weights):
                    minus_lses = lax.broadcast_in_dim(minus_lse, (ROWS, BK), [0])
                    if masked:
                        is_seen = token_sees_slot(start, tile * BK, (ROWS, BK), L, seen, token_axis=0)
                        minus_lses = jnp.where(is_seen, minus_lses, -jnp.inf)
                    scores[...] = minus_lses
                    d_weights[...] = lax.broadcast_in_dim(minus_delta, (ROWS, BK), [0])
                    plgpu.wgmma(scores, q_mine, k.transpose((1, 0)))
                    plgpu.wgmma(d_weights, do, v.transpose((1, 0)))
                    weights = jnp.exp2(lax.optimization_barrier(plgpu.wgmma_accumulator_load(scores, wait_n=1)))
                    return weights * lax.optimization_barrier(plgpu.wgmma_accumulator_load(d_weights, wait_n=0))

                accumulator = plgpu.ACC((ROWS, BK), jnp.float32)
                d_scores = pl.run_scoped(gradients, accumulator, accumulator)
                rounded = d_scores.astype(q.dtype)
                d_q = pl.run_state(lambda ref: plgpu.wgmma(ref, rounded, k))(plgpu.ACC.init(d_q))
                plgpu.barrier_arrive(consumed.at[stage])
                return d_q, total + jnp.sum(d_scores, axis=1)

            carry = (d_q, launch.row_zeros(ROWS))
            if shape.segmented:
                carry = lax.fori_loop(first_tile, whole_from, functools.partial(add_tile, masked=True), carry)
            carry = lax.fori_loop(whole_from, whole_to, functools.partial(add_tile, masked=False), carry)
            d_q, total = lax.fori_loop(whole_to, end_tile, functools.partial(add_tile, masked=True), carry)
            d_current_scores.at[row, n, at][...] = total * -scale
            return d_q

        def load_rows(j):
            n = head_of(jnp.minimum(j, heads - 1))
            return tuple(launch.load_rows(x.at[row, n, at], 1, optimized=False) for x in (lse, delta))

        def store_head(j, rows):
            ahead, tile = load_rows(j + 1), query_tiles.at[buffer_of(j)]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the head before, from the memory of the next
            d_q = add_head(j, launch.zeros((ROWS, shape.head_dim)), rows)
            tile[...] = (d_q * scale).astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, d_queries.at[row, at, head_of(j)])
            return ahead

        if together:
            lax.fori_loop(0, heads, store_head, load_rows(jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0)
        else:
            d_q = lax.fori_loop(0, heads, add_head, launch.zeros((ROWS, shape.head_dim)))
            d_queries.at[row, at, g][...] = d_q * scale

    @pl.when(group == MEMORY_GROUP)
    def _memory():
        plgpu.set_max_registers(launch.MEMORY_REGISTERS, action="decrease")

        def fill(step):
            stage = lax.rem(step, KEY_STAGES)
            n = head_of(lax.div(step, tiles))
            at = row, pl.ds((first_tile + lax.rem(step, tiles)) * BK, BK), key_head(shape, keys, n)
            plgpu.copy_gmem_to_smem(keys.at[at], key_ring.at[stage], filled.at[stage])
            plgpu.copy_gmem_to_smem(values.at[at], value_ring.at[stage], filled.at[stage])

        launch.produce(tiles * heads, KEY_STAGES, (consumed, fill))


def queries_gradients(
    shape: RatShape, d_heads, delta, lse, queries, keys, values, seen=None, *, scale=None, together=None
):
    """dq and the gradients of current-token scores, float32, of a call whose tokens and slots fill whole tiles.

    `scale` is that of the scores, 1 / sqrt(H) if None. Where every head has queries of its own a program goes through
    so many heads `together`, and dq is of the dtype of `queries`.
    """
    scale = 1 / math.sqrt(shape.head_dim) if scale is None else scale
    dtype = jnp.dtype(shape.dtype)
    groups = shape.num_heads // together if together else shape.num_groups
    order = launch.Order(shape.tokens // (COMPUTE_GROUPS * ROWS), shape.batch, groups)
    mine = HEADS * COMPUTE_GROUPS
    ring = (KEY_STAGES, KEYS, shape.head_dim)
    bounds = places(seen, lambda seen: slot_tiles(seen, COMPUTE_GROUPS * ROWS, KEYS))
    return launch.kernel(
        functools.partial(rat_queries_backward_mosaic, shape=shape, order=order, scale=scale, together=together),
        name=rat_queries_backward_mosaic.__name__,
        programs=order.programs,
        out_type=(
            jax.ShapeDtypeStruct(queries.shape, dtype if together else jnp.float32),
            jax.ShapeDtypeStruct((shape.batch, shape.num_heads, shape.tokens), jnp.float32),
        ),
        scratch_types=(
            launch.tiled((mine if together else COMPUTE_GROUPS, ROWS, shape.head_dim), dtype),
            launch.tiled((mine, ROWS, shape.head_dim), dtype),
            None if together else plgpu.SMEM((mine, ROWS), jnp.float32),
            None if together else plgpu.SMEM((mine, ROWS), jnp.float32),
            launch.tiled(ring, dtype),
            launch.tiled(ring, dtype),
            None if together else plgpu.Barrier(num_barriers=COMPUTE_GROUPS),
            plgpu.Barrier(num_arrivals=2 if together else 3, num_barriers=mine),
            plgpu.Barrier(num_arrivals=2, num_barriers=KEY_STAGES),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=KEY_STAGES),
        ),
    )(d_heads, delta, lse, queries, keys, values, *bounds)


def backward(
    shape: RatShape,
    d_heads: jax.Array,
    delta: jax.Array,
    lse: jax.Array,
    rotated_queries: jax.Array,
    summary_keys: jax.Array,
    summary_values: jax.Array,
    current_scores: jax.Array,
    seen: SeenSlots | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Float32 gradients of queries, current-token scores and summaries, and the softmax weights of the current pairs.

    Args:
      shape: sizes for which `mosaic_gpu_tiling.unsupported_reason` has no reason.
      d_heads: [B, T, N, H], the gradient of the heads before their gate.
      delta: [B, N, T] float32, the sum over channels of that gradient times the heads.
      lse: [B, N, T] float32, as `attention.forward` returns it.
      rotated_queries: [B, T, G, H], scaled so that products with keys are scores in powers of two.
      summary_keys: [B, C, N, H]; of packed documents numbers, also in slots that no chunk completes.
      summary_values: [B, C, N, H].
      current_scores: [B, N, T], in powers of two.
      seen: of packed documents.

    Returns:
      The gradient of the unscaled rotated queries through the summaries, summed over the heads of a group [B, T, G, H];
      that of q . k~, from which the scores come [B, N, T]; the current pair's weights [B, N, T]; the gradients of the
      summaries' keys and values [B, C, N, H], zero in slots that no token sees.
    """
    whole = padded(shape)
    shared = (
        pad_tokens(shape, d_heads, 1),
        pad_tokens(shape, delta, 2),
        pad_tokens(shape, lse, 2),
        pad_tokens(shape, rotated_queries, 1),
        pad_summaries(shape, summary_keys, seen),
        pad_summaries(shape, summary_values, seen),
        pad_seen(shape, seen),
    )
    d_queries, d_current_scores = queries_gradients(whole, *shared)
    d_keys, d_values = summaries_gradients(whole, *shared)
    current_weights = jnp.exp2(current_scores - lse)
    return (
        d_queries[:, : shape.tokens],
        d_current_scores[:, :, : shape.tokens],
        current_weights,
        d_keys[:, : shape.num_chunks],
        d_values[:, : shape.num_chunks],
    )
