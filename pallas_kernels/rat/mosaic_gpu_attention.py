"""Attention of every token to the summaries of earlier chunks and to its own running pair.

With scores in powers of two, s_tc = q_t . K_c / (sqrt(H) ln 2), current score s_t, summaries K, V, running value v~_t:

    out_t = sigmoid(z_t) o_t,   o_t = (2^(s_t - m) v~_t + sum_c 2^(s_tc - m) V_c) / (2^(s_t - m) + sum_c 2^(s_tc - m)).

The online softmax starts from the current pair (m = s_t, sum 1), so that a token without earlier chunks needs no
case of its own; its value joins at the end, when it is read together with z.

Where there is neither current pair nor gate this is softmax attention (`pallas_kernels.attention.mosaic_gpu`): slots
are tokens, the softmax starts from a score far below all, and a token that sees nothing reads 0.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.mosaic_gpu import COMPUTE_GROUPS, MEMORY_GROUP
from pallas_kernels.launch.sizes import LOG2_E, ROWS, SEES_NOTHING
from pallas_kernels.rat.mosaic_gpu_mask import key_head, load_seen, tiles_of, token_sees_slot
from pallas_kernels.rat.mosaic_gpu_tiling import pad_seen, pad_summaries, pad_tokens, padded
from pallas_kernels.rat.seen_slots import SeenSlots, places, slot_tiles
from pallas_kernels.rat.shape import RatShape


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How a program goes through the summaries.

    Attributes:
      keys: summaries of a tile.
      stages: such tiles in flight.
      heads: heads whose current values and gates are in shared memory at once; 2 reads them a head ahead.
      turns: the compute groups take turns, one at the matrix units while the other is at its softmax.
    """

    keys: int
    stages: int
    heads: int
    turns: bool


def rat_attention_forward_mosaic(
    projected,  # [B, T, 3 N + 2 G, H], of which z, the first N, is read; a placeholder if BARE, as the next two
    running_values,  # [B, T, N, H]
    current_scores,  # [B, N, T] float32
    queries,  # [B, T, G, H], scaled
    keys,  # [B, C, N, H]; or fewer heads, which neighbouring heads share
    values,  # as keys
    first_slots,  # [B, T] int32, of packed documents; else a placeholder, as the next two
    end_slots,  # [B, T] int32
    bounds,  # [B, T / (COMPUTE_GROUPS ROWS), 4] int32, of `seen_slots.slot_tiles`
    out,  # [B, T, N, H]
    lse,  # [B, N, T] float32
    query_tiles,
    own_value_tiles,  # None if BARE
    gate_tiles,  # in which a head's result is stored; of one head if BARE, else of blocks.heads
    key_ring,
    value_ring,
    queries_loaded,
    head_loaded,  # None if BARE
    keys_filled,
    values_filled,
    keys_consumed,
    values_consumed,
    turn,
    *,
    shape: RatShape,
    order: launch.Order,
    blocks: Blocks,
    bare: bool,
    together: int,
):
    """One program computes COMPUTE_GROUPS * ROWS tokens for the heads of a group, which share the query.

    If BARE, of `together` neighbouring heads with queries of their own; the next head's are read ahead.
    """
    L, BK = shape.chunk_size, blocks.keys
    heads = together if bare else shape.heads_per_group
    block, row, g = order.place(lax.axis_index("program"))
    first_token = (order.blocks - 1 - block) * (COMPUTE_GROUPS * ROWS)  # the last tokens see most
    group = lax.axis_index("group")
    first_tile, whole_from, whole_to, end_tile = tiles_of(shape, bounds, order, block, row, BK)
    tiles = end_tile - first_tile

    def head_of(j):
        return g * together + j if bare else g + j * shape.num_groups

    def announce():
        if blocks.turns:
            plgpu.barrier_arrive(turn)

    def await_turn():
        if blocks.turns:
            plgpu.barrier_wait(turn)

    @pl.when(group < COMPUTE_GROUPS)
    def _compute():
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")
        start = first_token + group * ROWS
        at = pl.ds(start, ROWS)
        q = query_tiles.at[group]
        plgpu.copy_gmem_to_smem(queries.at[row, at, g * together if bare else g], q, queries_loaded.at[group])
        seen = load_seen(first_slots, end_slots, row, at) if shape.segmented else None

        def buffer_of(j):
            return group if bare else lax.rem(j, blocks.heads) * COMPUTE_GROUPS + group

        def load_head(j):
            if bare:
                return
            n, mine = head_of(j), buffer_of(j)
            plgpu.copy_gmem_to_smem(running_values.at[row, at, n], own_value_tiles.at[mine], head_loaded.at[mine])
            plgpu.copy_gmem_to_smem(projected.at[row, at, n], gate_tiles.at[mine], head_loaded.at[mine])

        def next_query(j):
            """The queries of head j, once they are there; from now on those of the head after it are copied."""
            if together == 1:
                return q
            mine, other = (lax.rem(i, 2) * COMPUTE_GROUPS + group for i in (j, j + 1))

            @pl.when(j + 1 < together)
            def _ahead():
                plgpu.copy_gmem_to_smem(
                    queries.at[row, at, head_of(j + 1)], query_tiles.at[other], queries_loaded.at[other]
                )

            plgpu.barrier_wait(queries_loaded.at[mine])
            return query_tiles.at[mine]

        def load_own(j):
            if bare:
                return launch.row_zeros(ROWS) + SEES_NOTHING
            n = g + jnp.minimum(j, shape.heads_per_group - 1) * shape.num_groups
            return launch.load_rows(current_scores.at[row, n, at], 1, optimized=False)

        if blocks.heads > 1:
            load_head(jnp.int32(0))
        if together == 1:
            plgpu.barrier_wait(queries_loaded.at[group])

        @pl.when(group == 1)
        def _second_group_is_half_a_tile_behind():
            announce()
            await_turn()

        def attend_head(j, own):
            n, mine, q = head_of(j), buffer_of(j), next_query(j)
            if blocks.heads == 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the head before, from the gate's memory
                load_head(j)
                next_own = own = load_own(j)
            else:
                next_own = load_own(j + 1)

            def add_tile(tile, carry, masked):
                acc, largest, total = carry
                stage = lax.rem(j * tiles + tile - first_tile, blocks.stages)
                plgpu.barrier_wait(keys_filled.at[stage])

                def products(ref):
                    if masked:
                        is_seen = token_sees_slot(start, tile * BK, (ROWS, BK), L, seen, token_axis=0)
                        ref[...] = jnp.where(is_seen, launch.zeros((ROWS, BK)), -jnp.inf)
                    plgpu.wgmma(ref, q, key_ring.at[stage].transpose((1, 0)))
                    announce()
                    await_turn()
                    return ref[...]

                scores = pl.run_scoped(products, plgpu.ACC((ROWS, BK), jnp.float32))
                plgpu.barrier_arrive(keys_consumed.at[stage])
                before, largest = largest, jnp.maximum(largest, jnp.max(scores, axis=1))
                shrink = jnp.exp2(before - largest)
                weights = jnp.exp2(scores - lax.broadcast_in_dim(largest, scores.shape, [0]))
                total = total * shrink + jnp.sum(weights, axis=1)
                acc *= lax.broadcast_in_dim(shrink, acc.shape, [0])
                rounded = weights.astype(q.dtype)
                if blocks.turns:
                    acc, largest, total, rounded = lax.optimization_barrier((acc, largest, total, rounded))
                announce()
                plgpu.barrier_wait(values_filled.at[stage])
                await_turn()
                acc = pl.run_state(lambda ref: plgpu.wgmma(ref, rounded, value_ring.at[stage]))(plgpu.ACC.init(acc))
                plgpu.barrier_arrive(values_consumed.at[stage])
                return acc, largest, total

            carry = (launch.zeros((ROWS, shape.head_dim)), own, launch.row_zeros(ROWS) + 1.0)
            if shape.segmented:
                carry = lax.fori_loop(first_tile, whole_from, functools.partial(add_tile, masked=True), carry)
            carry = lax.fori_loop(whole_from, whole_to, functools.partial(add_tile, masked=False), carry)
            acc, largest, total = lax.fori_loop(whole_to, end_tile, functools.partial(add_tile, masked=True), carry)

            if blocks.heads > 1:
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the head before, from the next gate's memory
                pl.when(j + 1 < heads)(lambda: load_head(j + 1))
            gate = gate_tiles.at[mine]
            inverse = 1.0 / total
            y = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            if bare:
                gate[...] = y.astype(q.dtype)
            else:
                plgpu.barrier_wait(head_loaded.at[mine])
                share = jnp.exp2(own - largest) * inverse
                y += own_value_tiles.at[mine][...].astype(jnp.float32) * lax.broadcast_in_dim(share, acc.shape, [0])
                # A square of rsqrt is a quotient in two instructions.
                root = lax.rsqrt(1.0 + jnp.exp2(gate[...].astype(jnp.float32) * -LOG2_E))
                gate[...] = (y * (root * root)).astype(q.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(gate, out.at[row, at, n])
            lse.at[row, n, at][...] = largest + jnp.log(total) * LOG2_E
            return next_own

        lax.fori_loop(0, heads, attend_head, load_own(jnp.int32(0)))

        @pl.when(group == 0)
        def _first_group_is_half_a_tile_ahead():
            announce()
            await_turn()

        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == MEMORY_GROUP)
    def _memory():
        plgpu.set_max_registers(launch.MEMORY_REGISTERS, action="decrease")

        def place(step):
            n = head_of(lax.div(step, tiles))
            at = pl.ds((first_tile + lax.rem(step, tiles)) * BK, BK)
            return lax.rem(step, blocks.stages), (row, at, key_head(shape, keys, n))

        def fill_keys(step):
            stage, at = place(step)
            plgpu.copy_gmem_to_smem(keys.at[at], key_ring.at[stage], keys_filled.at[stage])

        def fill_values(step):
            stage, at = place(step)
            plgpu.copy_gmem_to_smem(values.at[at], value_ring.at[stage], values_filled.at[stage])

        launch.produce(
            tiles * heads,
            blocks.stages,
            (keys_consumed, fill_keys),
            (values_consumed, fill_values),
        )


def blocks_of(slots: int) -> Blocks:
    """Measured for head_dim 128 in bfloat16 at 256, 1024 and 8192 slots a row; the borders between them are not."""
    if slots <= 512:
        return Blocks(64, 2, 2, True)
    return Blocks(128, 2, 1, turns=slots > 2048)


def attend(
    shape: RatShape,
    projected,
    running_values,
    current_scores,
    queries,
    keys,
    values,
    blocks=None,
    seen=None,
    together=1,
):
    """The gated heads [B, T, N, H] and the log-sum-exp of a call whose tokens and slots fill whole tiles.

    Of attention to slots alone, without gate and current pair, if `projected` and the next two are None; every head has
    queries of its own then, and a program goes through so many heads `together`.
    """
    dtype, bare = jnp.dtype(shape.dtype), projected is None
    blocks = blocks or blocks_of(keys.shape[1])
    if bare:
        projected = running_values = jnp.zeros((1, 1, 1, 1), dtype)
        current_scores = jnp.zeros((1, 1, 1), jnp.float32)
    groups = shape.num_heads // together if bare else shape.num_groups
    order = launch.Order(shape.tokens // (COMPUTE_GROUPS * ROWS), shape.batch, groups)
    query_buffers = COMPUTE_GROUPS * min(2, together)
    buffers = COMPUTE_GROUPS if bare else blocks.heads * COMPUTE_GROUPS
    rows, ring = (buffers, ROWS, shape.head_dim), (blocks.stages, blocks.keys, shape.head_dim)
    return launch.kernel(
        functools.partial(
            rat_attention_forward_mosaic, shape=shape, order=order, blocks=blocks, bare=bare, together=together
        ),
        name=rat_attention_forward_mosaic.__name__,
        programs=order.programs,
        out_type=(
            jax.ShapeDtypeStruct((shape.batch, shape.tokens, shape.num_heads, shape.head_dim), dtype),
            jax.ShapeDtypeStruct((shape.batch, shape.num_heads, shape.tokens), jnp.float32),
        ),
        scratch_types=(
            launch.tiled((query_buffers, ROWS, shape.head_dim), dtype),
            None if bare else launch.tiled(rows, dtype),
            launch.tiled(rows, dtype),
            launch.tiled(ring, dtype),
            launch.tiled(ring, dtype),
            plgpu.Barrier(num_barriers=query_buffers),
            None if bare else plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
            plgpu.Barrier(num_barriers=blocks.stages),
            plgpu.Barrier(num_barriers=blocks.stages),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=blocks.stages),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS, num_barriers=blocks.stages),
            plgpu.Barrier(num_arrivals=COMPUTE_GROUPS),
        ),
    )(
        projected,
        running_values,
        current_scores,
        queries,
        keys,
        values,
        *places(seen, lambda seen: slot_tiles(seen, COMPUTE_GROUPS * ROWS, blocks.keys)),
    )


def forward(
    shape: RatShape,
    projected: jax.Array,
    running_values: jax.Array,
    current_scores: jax.Array,
    rotated_queries: jax.Array,
    summary_keys: jax.Array,
    summary_values: jax.Array,
    seen: SeenSlots | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated output [B, T, D] in the dtype of `projected`, and the log-sum-exp [B, N, T] float32, in powers of two.

    Args:
      shape: sizes for which `mosaic_gpu_tiling.unsupported_reason` has no reason.
      projected: [B, T, 3 D + 2 G H], of which z, the first D, is read.
      running_values: [B, T, N, H].
      current_scores: [B, N, T] float32, in powers of two.
      rotated_queries: [B, T, G, H], scaled so that products with keys are scores in powers of two.
      summary_keys: [B, C, N, H]; of packed documents numbers, also in slots that no chunk completes.
      summary_values: [B, C, N, H].
      seen: of packed documents; summaries may be those of a cache then, in C slots of it.
    """
    heads = projected.reshape(shape.batch, shape.tokens, -1, shape.head_dim)
    out, lse = attend(
        padded(shape),
        pad_tokens(shape, heads, 1),
        pad_tokens(shape, running_values, 1),
        pad_tokens(shape, current_scores, 2),
        pad_tokens(shape, rotated_queries, 1),
        pad_summaries(shape, summary_keys, seen),
        pad_summaries(shape, summary_values, seen),
        seen=pad_seen(shape, seen),
    )
    return out[:, : shape.tokens].reshape(shape.batch, shape.tokens, shape.width), lse[:, :, : shape.tokens]
