"""Attention of every token over the earlier chunk summaries, started from the current token's running pair."""

import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.launch.tpu import Interpret, launch, matmul, to_column, to_row
from pallas_kernels.rat.tpu_recurrence import gate_operands, running
from pallas_kernels.rat.tpu_tiling import Tiling

NAME = "rat_tpu_attention"
MASKED = -1e30  # score of a hidden slot; finite, and every row has its own score, so that no row is all masked


def attention(
    tiling: Tiling,
    projected: jax.Array,
    bias: jax.Array,
    rotated_query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    rows: jax.Array | None,
    slots: jax.Array | None,
    state: tuple[jax.Array, jax.Array] | None,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array]:
    """`sigmoid(z) * y` [B, rows, N lanes] and the log-sum-exp [B, N, tiles, 1, tile] float32.

    Args:
      rotated_query: [B, rows, G lanes], rotated and scaled.
      keys: and `values`, the summaries [B, slot blocks * slot_block, N lanes], zero past the last slot.
      rows: as `summaries` takes them.
      slots: int32 [B, 2, slot blocks * slot_block]: document of each slot (-1: none) and the row that completes it.
      state: running pair before every tile, float32 [B, tiles, 1, N lanes] each, or None if no state crosses tiles.
    """
    heads, groups = tiling.shape.num_heads, tiling.shape.num_groups

    def locate(batch, head, tile, _):
        return batch, head, tile

    def slot_block(tile, block):
        return jnp.minimum(block, jnp.maximum(tiling.last_visible_slot(tile), 0) // tiling.slot_block)

    tile_block = (1, tiling.tile, tiling.lanes)
    head_columns = pl.BlockSpec(tile_block, lambda batch, head, tile, _: (batch, tile, head))
    key_columns = pl.BlockSpec(
        (1, tiling.slot_block, tiling.lanes), lambda batch, head, tile, block: (batch, slot_block(tile, block), head)
    )
    group_columns = pl.BlockSpec(tile_block, lambda batch, head, tile, _: (batch, tile, head % groups))
    query_columns = pl.BlockSpec(tile_block, lambda batch, head, tile, _: (batch, tile, 3 * heads + head % groups))
    inputs = gate_operands(tiling, projected, bias, rows, locate) | {
        "output_gate": (projected, head_columns),
        "query": (projected, query_columns),
        "rotated_query": (rotated_query, group_columns),
        "slot_keys": (keys, key_columns),
        "slot_values": (values, key_columns),
    }
    if slots is not None:
        spec = pl.BlockSpec(
            (1, 2, tiling.slot_block), lambda batch, _, tile, block: (batch, 0, slot_block(tile, block))
        )
        inputs["slots"] = slots, spec
    if state is not None:
        spec = pl.BlockSpec((1, 1, 1, tiling.lanes), lambda batch, head, tile, _: (batch, tile, 0, head))
        inputs |= {"state_key": (state[0], spec), "state_value": (state[1], spec)}
    width = heads * tiling.lanes
    log_sum_exp = jax.ShapeDtypeStruct((tiling.shape.batch, heads, tiling.tiles, 1, tiling.tile), jnp.float32)
    outputs = {
        "out": (jax.ShapeDtypeStruct((tiling.shape.batch, tiling.rows, width), tiling.dtype), head_columns),
        "log_sum_exp": (
            log_sum_exp,
            pl.BlockSpec((1, 1, 1, 1, tiling.tile), lambda batch, head, tile, _: (batch, head, tile, 0, 0)),
        ),
    }
    column = ((tiling.tile, 1), jnp.float32)
    results = launch(
        _attention_kernel,
        NAME,
        tiling,
        (tiling.shape.batch, tiling.shape.num_heads, tiling.tiles, tiling.slot_blocks),
        "pppa",
        inputs,
        outputs,
        {"maximum": column, "total": column, "sum": ((tiling.tile, tiling.lanes), jnp.float32)},
        interpret,
    )
    return results["out"], results["log_sum_exp"]


def _attention_kernel(tiling: Tiling, refs: types.SimpleNamespace) -> None:
    tile, block = pl.program_id(2), pl.program_id(3)

    @pl.when(block == 0)
    def _():
        run = running(tiling, refs, tile, tile_state(tiling, refs))
        refs.maximum[...] = current_score(tiling, refs.query[0], run.key)
        refs.total[...] = jnp.ones_like(refs.total)
        refs.sum[...] = run.value

    def attend(masked: bool):
        scores = matmul(refs.rotated_query[0], refs.slot_keys[0], (1, 1))
        if masked:
            scores = jnp.where(visible_slots(tiling, refs, tile, block), scores, MASKED)
        maximum = jnp.maximum(refs.maximum[...], jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp(scores - maximum)
        shrink = jnp.exp(refs.maximum[...] - maximum)
        refs.maximum[...] = maximum
        refs.total[...] = refs.total[...] * shrink + jnp.sum(weights, axis=1, keepdims=True)
        product = matmul(weights.astype(tiling.dtype), refs.slot_values[0], (1, 0))
        refs.sum[...] = refs.sum[...] * shrink + product

    for_visible_block(tiling, tile, block, attend)

    @pl.when(block == tiling.slot_blocks - 1)
    def _():
        gate = jax.nn.sigmoid(refs.output_gate[0].astype(jnp.float32))
        refs.out[0] = (gate * refs.sum[...] / refs.total[...]).astype(tiling.dtype)
        refs.log_sum_exp[0, 0, 0] = to_row(refs.maximum[...] + jnp.log(refs.total[...]))


def tile_state(tiling: Tiling, refs: types.SimpleNamespace) -> tuple[jax.Array, jax.Array] | None:
    """The running pair before the tile."""
    return (refs.state_key[0, 0], refs.state_value[0, 0]) if tiling.carries else None


def current_score(tiling: Tiling, query: jax.Array, key: jax.Array) -> jax.Array:
    """q_t . k~_t / sqrt(H) of every row, [rows, 1]. The chunk's rotation is the same on both sides and cancels."""
    return tiling.shape.head_dim**-0.5 * jnp.sum(query.astype(jnp.float32) * key, axis=1, keepdims=True)


def for_visible_block(tiling: Tiling, tile: jax.Array, block: jax.Array, work) -> None:
    """Calls `work(masked)` unless the tile sees none of the block's slots; masked unless every row sees all of them."""
    some = block * tiling.slot_block <= tiling.last_visible_slot(tile)
    if tiling.shape.segmented:
        pl.when(some)(lambda: work(True))
        return
    every = (block + 1) * tiling.slot_block <= tiling.first_slot(tile)
    if tiling.partial:
        every &= (tile + 1) * tiling.tile <= tiling.length
    pl.when(every)(lambda: work(False))
    pl.when(some & jnp.logical_not(every))(lambda: work(True))


def visible_slots(tiling: Tiling, refs: types.SimpleNamespace, tile: jax.Array, block: jax.Array) -> jax.Array:
    """bool [rows, slots]: completed before the row, in the row's document."""
    row = tile * tiling.tile + lax.broadcasted_iota(jnp.int32, (tiling.tile, 1), 0)
    if tiling.shape.segmented:
        document = to_column(refs.rows[0, 0, 0:1])
        return (document == refs.slots[0, 0:1]) & (refs.slots[0, 1:2] < row)
    slot = block * tiling.slot_block + lax.broadcasted_iota(jnp.int32, (1, tiling.slot_block), 1)
    return slot < row // tiling.stride
