"""Gradients of the RAT mixing op: one kernel walks slots, one walks tokens; the running pairs are computed again.

With p the softmax weights, y the attention output and delta_t = sum(d_y y) = sum(d_out out) of a head:
d_score = p (d_y . v~ - delta), for the summaries and the current token's pair alike.
"""

import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.launch.tpu import Interpret, launch, matmul, to_column
from pallas_kernels.rat.tpu_attention import current_score, for_visible_block, tile_state, visible_slots
from pallas_kernels.rat.tpu_recurrence import (
    exact_dot,
    gate_operands,
    running,
    scan_back,
    slot_operand,
    slot_selection,
    swap_halves,
)
from pallas_kernels.rat.tpu_tiling import Tiling

SLOTS_NAME = "rat_tpu_slot_gradients"
TOKENS_NAME = "rat_tpu_token_gradients"


def slot_gradients(
    tiling: Tiling,
    projected: jax.Array,
    rotated_query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    d_out: jax.Array,
    sums: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    rows: jax.Array | None,
    slots: jax.Array | None,
    interpret: Interpret,
) -> tuple[jax.Array, jax.Array]:
    """Gradients of the chunk-final k~ (before its rotation) and v~, float32 [B, slot blocks * slot_block, N lanes].

    Args:
      d_out: [B, rows, N lanes].
      sums: float32 [B, N, tiles, 2, tile]: log-sum-exp and delta of every token.
      cos: and `sin`, float32 [1 or B, slot blocks * slot_block, lanes].
      The rest is as in `attention.attention`.
    """

    def tile_of(block, tile):
        first = jnp.minimum(tiling.first_visible_tile(block * tiling.slot_block), tiling.tiles - 1)
        return jnp.maximum(tile, first)

    tile_block, slot_block = (1, tiling.tile, tiling.lanes), (1, tiling.slot_block, tiling.lanes)
    head_columns = pl.BlockSpec(tile_block, lambda batch, head, block, tile: (batch, tile_of(block, tile), head))
    slot_columns = pl.BlockSpec(slot_block, lambda batch, head, block, _: (batch, block, head))
    table = pl.BlockSpec(slot_block, lambda batch, _, block, __: (batch if tiling.shape.segmented else 0, block, 0))
    inputs = {
        "output_gate": (projected, head_columns),
        "d_out": (d_out, head_columns),
        "rotated_query": (
            rotated_query,
            pl.BlockSpec(
                tile_block,
                lambda batch, head, block, tile: (batch, tile_of(block, tile), head % tiling.shape.num_groups),
            ),
        ),
        "slot_keys": (keys, slot_columns),
        "slot_values": (values, slot_columns),
        "sums": (
            sums,
            pl.BlockSpec(
                (1, 1, 1, 2, tiling.tile), lambda batch, head, block, tile: (batch, head, tile_of(block, tile), 0, 0)
            ),
        ),
        "cos": (cos, table),
        "sin": (sin, table),
    }
    if rows is not None and slots is not None:
        row_block = (1, 1, 2, tiling.tile)
        inputs["rows"] = (
            rows,
            pl.BlockSpec(row_block, lambda batch, _, block, tile: (batch, tile_of(block, tile), 0, 0)),
        )
        inputs["slots"] = slots, pl.BlockSpec((1, 2, tiling.slot_block), lambda batch, _, block, __: (batch, 0, block))
    shape = jax.ShapeDtypeStruct(keys.shape, jnp.float32)
    results = launch(
        _slot_kernel,
        SLOTS_NAME,
        tiling,
        (tiling.shape.batch, tiling.shape.num_heads, tiling.slot_blocks, tiling.tiles),
        "pppa",
        inputs,
        {"d_key": (shape, slot_columns), "d_value": (shape, slot_columns)},
        {},
        interpret,
    )
    return results["d_key"], results["d_value"]


def _slot_kernel(tiling: Tiling, refs: types.SimpleNamespace) -> None:
    block, tile = pl.program_id(2), pl.program_id(3)

    @pl.when(tile == 0)
    def _():
        refs.d_key[...] = jnp.zeros_like(refs.d_key)
        refs.d_value[...] = jnp.zeros_like(refs.d_value)

    def collect(masked: bool):
        query = refs.rotated_query[0]
        d_mixed = refs.d_out[0].astype(jnp.float32) * jax.nn.sigmoid(refs.output_gate[0].astype(jnp.float32))
        if masked and tiling.partial:  # rows past the end hold anything, and zero times anything may be NaN
            row = tile * tiling.tile + lax.broadcasted_iota(jnp.int32, (tiling.tile, 1), 0)
            query = jnp.where(row < tiling.length, query, jnp.zeros_like(query))
            d_mixed = jnp.where(row < tiling.length, d_mixed, 0.0)
        d_mixed = d_mixed.astype(tiling.dtype)
        # Scores are transposed, [slots, rows], so that the sums of every token lie along the lanes.
        scores = matmul(refs.slot_keys[0], query, (1, 1))
        weights = jnp.exp(scores - refs.sums[0, 0, 0, 0:1])
        d_scores = weights * (matmul(refs.slot_values[0], d_mixed, (1, 1)) - refs.sums[0, 0, 0, 1:2])
        if masked:
            visible = _visible_rows(tiling, refs, tile, block)
            weights, d_scores = jnp.where(visible, weights, 0.0), jnp.where(visible, d_scores, 0.0)
        refs.d_value[0] += matmul(weights.astype(tiling.dtype), d_mixed, (1, 0))
        refs.d_key[0] += matmul(d_scores.astype(tiling.dtype), query, (1, 0))

    for_visible_block(tiling, tile, block, collect)

    @pl.when(tile == tiling.tiles - 1)
    def _():
        d_key = refs.d_key[0]
        refs.d_key[0] = d_key * refs.cos[0] - swap_halves(d_key) * refs.sin[0]


def _visible_rows(tiling: Tiling, refs: types.SimpleNamespace, tile: jax.Array, block: jax.Array) -> jax.Array:
    """`visible_slots` transposed: bool [slots, rows]."""
    row = tile * tiling.tile + lax.broadcasted_iota(jnp.int32, (1, tiling.tile), 1)
    inside = row < tiling.length
    if tiling.shape.segmented:
        document, end = to_column(refs.slots[0, 0:1]), to_column(refs.slots[0, 1:2])
        return (document == refs.rows[0, 0, 0:1]) & (end < row) & inside
    slot = block * tiling.slot_block + lax.broadcasted_iota(jnp.int32, (tiling.slot_block, 1), 0)
    return (slot < row // tiling.stride) & inside


def token_gradients(
    tiling: Tiling,
    projected: jax.Array,
    bias: jax.Array,
    rotated_query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    out: jax.Array,
    d_out: jax.Array,
    sums: jax.Array,
    d_summaries: tuple[jax.Array, jax.Array],
    rows: jax.Array | None,
    slots: jax.Array | None,
    slot_ends: jax.Array | None,
    state: tuple[jax.Array, jax.Array] | None,
    interpret: Interpret,
) -> dict[str, jax.Array]:
    """Gradients of everything that belongs to a token.

    Args:
      d_summaries: of k~ and v~ at the slots, float32 [B, slot tiles, slots of a tile, N lanes] each.
      The rest is as in `slot_gradients` and `attention.attention`.

    Returns:
      `d_output_gate`, `d_value`, `d_gate` [B, rows, N lanes]; `d_rotated_query`, `d_query` (its part through the
      current score) and `d_key`, summed over the heads of a group, float32 [B, rows, G lanes]; `d_bias` float32
      [B, tiles, 1, N lanes].
    """
    per_group = tiling.shape.num_heads // tiling.shape.num_groups

    # Tiles run from the last to the first, because gradients of the running pair do; the heads of a group follow each
    # other, so that the group's gradients stay where they are summed.
    def locate(batch, step, group, member, _=0):
        return batch, member * tiling.shape.num_groups + group, tiling.tiles - 1 - step

    def head_columns(first: int = 0):
        def index(*ids):
            batch, head, tile = locate(*ids)
            return batch, tile, first + head

        return pl.BlockSpec((1, tiling.tile, tiling.lanes), index)

    def group_columns(first: int = 0):
        return pl.BlockSpec(
            (1, tiling.tile, tiling.lanes),
            lambda batch, step, group, *_: (batch, tiling.tiles - 1 - step, first + group),
        )

    def block_of(ids):
        return jnp.minimum(ids[4], jnp.maximum(tiling.last_visible_slot(locate(*ids)[2]), 0) // tiling.slot_block)

    def slot_columns(*ids):
        batch, head, _ = locate(*ids)
        return batch, block_of(ids), head

    def tile_row(*ids):
        batch, head, tile = locate(*ids)
        return batch, tile, 0, head

    def tile_slots(*ids):
        batch, head, tile = locate(*ids)
        return batch, tile // tiling.tiles_per_slot, 0, head

    def tile_sums(*ids):
        batch, head, tile = locate(*ids)
        return batch, head, tile, 0, 0

    key_columns = pl.BlockSpec((1, tiling.slot_block, tiling.lanes), slot_columns)
    summary_rows = pl.BlockSpec((1, 1, tiling.slots_per_tile, tiling.lanes), tile_slots)
    one_row = pl.BlockSpec((1, 1, 1, tiling.lanes), tile_row)
    inputs = gate_operands(tiling, projected, bias, rows, locate) | slot_operand(tiling, slot_ends, locate)
    inputs |= {
        "output_gate": (projected, head_columns()),
        "query": (projected, group_columns(3 * tiling.shape.num_heads)),
        "rotated_query": (rotated_query, group_columns()),
        "slot_keys": (keys, key_columns),
        "slot_values": (values, key_columns),
        "out": (out, head_columns()),
        "d_out": (d_out, head_columns()),
        "sums": (sums, pl.BlockSpec((1, 1, 1, 2, tiling.tile), tile_sums)),
        "d_summary_key": (d_summaries[0], summary_rows),
        "d_summary_value": (d_summaries[1], summary_rows),
    }
    if slots is not None:
        inputs["slots"] = slots, pl.BlockSpec((1, 2, tiling.slot_block), lambda *ids: (ids[0], 0, block_of(ids)))
    scratch = {"d_mixed": ((tiling.tile, tiling.lanes), tiling.dtype)}
    if state is not None:
        inputs |= {"state_key": (state[0], one_row), "state_value": (state[1], one_row)}
        scratch |= {
            name: ((tiling.shape.num_heads, 1, tiling.lanes), jnp.float32) for name in ("carry_key", "carry_value")
        }
    width = tiling.shape.num_heads * tiling.lanes
    per_head = jax.ShapeDtypeStruct((tiling.shape.batch, tiling.rows, width), tiling.dtype)
    per_key = jax.ShapeDtypeStruct(
        (tiling.shape.batch, tiling.rows, tiling.shape.num_groups * tiling.lanes), jnp.float32
    )
    outputs = {name: (per_head, head_columns()) for name in ("d_output_gate", "d_value", "d_gate")}
    outputs |= {name: (per_key, group_columns()) for name in ("d_rotated_query", "d_query", "d_key")}
    outputs["d_bias"] = jax.ShapeDtypeStruct((tiling.shape.batch, tiling.tiles, 1, width), jnp.float32), one_row
    return launch(
        _token_kernel,
        TOKENS_NAME,
        tiling,
        (tiling.shape.batch, tiling.tiles, tiling.shape.num_groups, per_group, tiling.slot_blocks),
        "paaaa" if tiling.carries else "ppaaa",
        inputs,
        outputs,
        scratch,
        interpret,
    )


def _token_kernel(tiling: Tiling, refs: types.SimpleNamespace) -> None:
    step, group, member, block = (pl.program_id(axis) for axis in range(1, 5))
    tile = tiling.tiles - 1 - step

    @pl.when((member == 0) & (block == 0))
    def _():
        for total in (refs.d_rotated_query, refs.d_query, refs.d_key):
            total[...] = jnp.zeros_like(total)

    @pl.when(block == 0)
    def _():
        gate = jax.nn.sigmoid(refs.output_gate[0].astype(jnp.float32))
        refs.d_mixed[...] = (refs.d_out[0].astype(jnp.float32) * gate).astype(tiling.dtype)

    def collect(masked: bool):
        scores = matmul(refs.rotated_query[0], refs.slot_keys[0], (1, 1))
        weights = jnp.exp(scores - to_column(refs.sums[0, 0, 0, 0:1]))
        d_weights = matmul(refs.d_mixed[...], refs.slot_values[0], (1, 1))
        d_scores = weights * (d_weights - to_column(refs.sums[0, 0, 0, 1:2]))
        if masked:
            d_scores = jnp.where(visible_slots(tiling, refs, tile, block), d_scores, 0.0)
        refs.d_rotated_query[0] += matmul(d_scores.astype(tiling.dtype), refs.slot_keys[0], (1, 0))

    for_visible_block(tiling, tile, block, collect)

    @pl.when(block == tiling.slot_blocks - 1)
    def _():
        _finish_tile(tiling, refs, tile, member * tiling.shape.num_groups + group)


def _finish_tile(tiling: Tiling, refs: types.SimpleNamespace, tile: jax.Array, head: jax.Array) -> None:
    """The current-token score's gradients, then those of the running pairs back through the recurrence."""
    state = tile_state(tiling, refs)
    run = running(tiling, refs, tile, state)
    query = refs.query[0].astype(jnp.float32)
    gate = jax.nn.sigmoid(refs.output_gate[0].astype(jnp.float32))
    d_out = refs.d_out[0].astype(jnp.float32)
    d_mixed = d_out * gate
    weight = jnp.exp(current_score(tiling, query, run.key) - to_column(refs.sums[0, 0, 0, 0:1]))
    d_weight = jnp.sum(d_mixed * run.value, axis=1, keepdims=True)
    d_score = tiling.shape.head_dim**-0.5 * weight * (d_weight - to_column(refs.sums[0, 0, 0, 1:2]))
    selection = slot_selection(tiling, refs, tile)
    d_key = jnp.where(run.inside, d_score * query, 0.0) + exact_dot(selection, refs.d_summary_key[0, 0], (0, 0))
    d_value = jnp.where(run.inside, weight * d_mixed, 0.0) + exact_dot(selection, refs.d_summary_value[0, 0], (0, 0))
    carry = None
    if tiling.carries:

        @pl.when(tile == tiling.tiles - 1)
        def _():
            refs.carry_key[head] = jnp.zeros((1, tiling.lanes), jnp.float32)
            refs.carry_value[head] = jnp.zeros((1, tiling.lanes), jnp.float32)

        carry = refs.carry_key[head], refs.carry_value[head]
    d_key, d_value = scan_back(tiling, run.decay, d_key, d_value, carry)
    if tiling.carries:
        refs.carry_key[head] = run.decay[0:1] * d_key[0:1]
        refs.carry_value[head] = run.decay[0:1] * d_value[0:1]
    # Where a chunk starts the state before is zero, whatever is in the row before.
    d_forget = d_key * jnp.where(run.start, 0.0, _before(tiling, run.key, state, 0))
    d_forget += d_value * jnp.where(run.start, 0.0, _before(tiling, run.value, state, 1))
    key, value = refs.key[0].astype(jnp.float32), refs.value[0].astype(jnp.float32)
    d_forget = d_forget - d_key * key - d_value * value
    d_gate = jnp.where(run.token, d_forget * run.forget * run.take, 0.0)
    refs.d_output_gate[0] = (d_out * refs.out[0].astype(jnp.float32) * (1.0 - gate)).astype(tiling.dtype)
    refs.d_value[0] = jnp.where(run.token, run.take * d_value, 0.0).astype(tiling.dtype)
    refs.d_gate[0] = d_gate.astype(tiling.dtype)
    refs.d_bias[0, 0] = jnp.sum(d_gate, axis=0, keepdims=True)
    refs.d_key[0] += jnp.where(run.token, run.take * d_key, 0.0)
    refs.d_query[0] += d_score * run.key


def _before(tiling: Tiling, x: jax.Array, state: tuple[jax.Array, jax.Array] | None, which: int) -> jax.Array:
    """Row t - 1 of `x` at row t; the tile's first row sees the state before the tile."""
    earlier = pltpu.roll(x, 1, 0)
    if state is None:
        return earlier
    first = lax.broadcasted_iota(jnp.int32, (tiling.tile, 1), 0) == 0
    return jnp.where(first, state[which], earlier)
