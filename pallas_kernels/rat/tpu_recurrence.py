"""The recurrence inside chunks, on one tile [rows, channels] of one head, and the kernel that keeps its summaries."""

import dataclasses
import types

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.launch.tpu import Interpret, launch, to_column
from pallas_kernels.rat.tpu_tiling import Tiling

NAME = "rat_tpu_summaries"


@dataclasses.dataclass(frozen=True)
class Running:
    """Gate and running pair of every row of a tile, float32 [rows, channels] unless said otherwise."""

    inside: jax.Array  # bool [rows, 1]: the row holds a token of the caller's array (padding too)
    token: jax.Array  # bool [rows, 1]: and is no padding
    start: jax.Array  # bool [rows, 1]: the state before the row is zero
    forget: jax.Array
    take: jax.Array  # 1 - forget
    decay: jax.Array  # what the earlier state is multiplied with
    key: jax.Array
    value: jax.Array


def running(tiling: Tiling, refs: types.SimpleNamespace, tile: jax.Array, state: tuple[jax.Array, jax.Array] | None):
    """Runs k~ and v~ over a tile whose first row follows `state` (None: the tile starts with a chunk)."""
    rows = tile * tiling.tile + lax.broadcasted_iota(jnp.int32, (tiling.tile, 1), 0)
    inside = rows < tiling.length
    if tiling.padded_chunks:
        inside &= rows % tiling.stride < tiling.shape.chunk_size
    if tiling.shape.segmented:
        token = inside & (to_column(refs.rows[0, 0, 0:1]) > 0)
        start = token & (to_column(refs.rows[0, 0, 1:2]) > 0)
    else:
        token = inside
        start = rows % tiling.stride == 0
    gate = refs.gate[0].astype(jnp.float32) + refs.bias[...]
    forget, take = jax.nn.sigmoid(gate), jax.nn.sigmoid(-gate)  # 1 - f would lose the digits of a gate near 1
    decay = jnp.where(start, 0.0, jnp.where(token, forget, 1.0))
    key = jnp.where(token, take * refs.key[0].astype(jnp.float32), 0.0)
    value = jnp.where(token, take * refs.value[0].astype(jnp.float32), 0.0)
    reach = decay
    if state is not None:
        first = lax.broadcasted_iota(jnp.int32, (tiling.tile, 1), 0) == 0
        key = key + jnp.where(first, decay * state[0], 0.0)
        value = value + jnp.where(first, decay * state[1], 0.0)
        reach = jnp.where(first, 0.0, decay)
    # The first row reaches back to nothing, so what rolls around from the tile's end is multiplied by zero.
    step = 1
    while step < tiling.scan_span:
        key = key + reach * pltpu.roll(key, step, 0)
        value = value + reach * pltpu.roll(value, step, 0)
        reach = reach * pltpu.roll(reach, step, 0)
        step *= 2
    return Running(inside=inside, token=token, start=start, forget=forget, take=take, decay=decay, key=key, value=value)


def scan_back(
    tiling: Tiling, decay: jax.Array, key: jax.Array, value: jax.Array, carry: tuple[jax.Array, jax.Array] | None
):
    """The transposed recurrence x_t + decay_{t+1} x_{t+1} + ...; `carry` is what the next tile adds to the last row."""
    reach = pltpu.roll(decay, tiling.tile - 1, 0)
    if carry is not None:
        last = lax.broadcasted_iota(jnp.int32, (tiling.tile, 1), 0) == tiling.tile - 1
        key = key + jnp.where(last, carry[0], 0.0)
        value = value + jnp.where(last, carry[1], 0.0)
        reach = jnp.where(last, 0.0, reach)
    step = 1
    while step < tiling.scan_span:
        key = key + reach * pltpu.roll(key, tiling.tile - step, 0)
        value = value + reach * pltpu.roll(value, tiling.tile - step, 0)
        reach = reach * pltpu.roll(reach, tiling.tile - step, 0)
        step *= 2
    return key, value


def slot_selection(tiling: Tiling, refs: types.SimpleNamespace, tile: jax.Array) -> jax.Array:
    """One-hot float32 [slots of the tile, rows]: the row at which each slot's chunk is complete, if it is."""
    shape = (tiling.slots_per_tile, tiling.tile)
    rows = tile * tiling.tile + lax.broadcasted_iota(jnp.int32, shape, 1)
    if tiling.shape.segmented:
        ends = refs.slot_ends[0, 0]
    else:
        ends = (
            (tiling.first_slot(tile) + lax.broadcasted_iota(jnp.int32, shape, 0)) * tiling.stride
            + tiling.shape.chunk_size
            - 1
        )
    return jnp.where((rows == ends) & (rows < tiling.length), 1.0, 0.0)


def exact_dot(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """float32 product over axis `contract[0]` of `left` and `contract[1]` of `right` without rounding of operands."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(left, right, dimensions, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)


def swap_halves(x: jax.Array) -> jax.Array:
    """Exchanges channels i and i + H/2."""
    return pltpu.roll(x, x.shape[-1] // 2, 1)


def gate_operands(tiling: Tiling, projected: jax.Array, bias: jax.Array, rows: jax.Array | None, locate) -> dict:
    """Blocks that `running` reads. `locate(*grid ids)` gives (batch, head, tile)."""

    def block(first: int, group: bool):
        def index(*ids):
            batch, head, tile = locate(*ids)
            return batch, tile, first + (head % tiling.shape.num_groups if group else head)

        return projected, pl.BlockSpec((1, tiling.tile, tiling.lanes), index)

    heads, groups = tiling.shape.num_heads, tiling.shape.num_groups
    operands = {
        "value": block(heads, False),
        "gate": block(2 * heads, False),
        "key": block(3 * heads + groups, True),
        "bias": (bias, pl.BlockSpec((1, tiling.lanes), lambda *ids: (0, locate(*ids)[1]))),
    }
    if rows is not None:
        operands["rows"] = (
            rows,
            pl.BlockSpec((1, 1, 2, tiling.tile), lambda *ids: (locate(*ids)[0], locate(*ids)[2], 0, 0)),
        )
    return operands


def slot_operand(tiling: Tiling, slot_ends: jax.Array | None, locate) -> dict:
    """The block that `slot_selection` reads."""
    if slot_ends is None:
        return {}

    def index(*ids):
        batch, _, tile = locate(*ids)
        return batch, tile // tiling.tiles_per_slot, 0, 0

    return {"slot_ends": (slot_ends, pl.BlockSpec((1, 1, tiling.slots_per_tile, 1), index))}


def summaries(
    tiling: Tiling,
    projected: jax.Array,
    bias: jax.Array,
    cos: jax.Array,
    sin: jax.Array,
    rows: jax.Array | None,
    slot_ends: jax.Array | None,
    interpret: Interpret,
) -> dict[str, jax.Array]:
    """Chunk-final pairs, keys rotated, and where state crosses tiles the one at every tile's start.

    Args:
      cos: and `sin` (signed by half), float32 [1 or B, slot tiles, slots of a tile, lanes].
      rows: int32 [B, tiles, 2, tile]: document number (0 is padding) and whether a chunk starts; None if aligned.
      slot_ends: int32 [B, slot tiles, slots of a tile, 1]: the row that completes each slot's chunk, or -1.

    Returns:
      `summary_key`, `summary_value` [B, tiles, slots of a tile, N lanes], and `tile_key`, `tile_value`
      [B, tiles, 1, N lanes] float32.
    """
    width = tiling.shape.num_heads * tiling.lanes

    def locate(batch, head, tile):
        return batch, head, tile

    def table(batch, head, tile):
        return batch if tiling.shape.segmented else 0, tile // tiling.tiles_per_slot, 0, 0

    per_tile = pl.BlockSpec(
        (1, 1, tiling.slots_per_tile, tiling.lanes), lambda batch, head, tile: (batch, tile, 0, head)
    )
    per_start = pl.BlockSpec((1, 1, 1, tiling.lanes), lambda batch, head, tile: (batch, tile, 0, head))
    tile_shape = jax.ShapeDtypeStruct((tiling.shape.batch, tiling.tiles, tiling.slots_per_tile, width), tiling.dtype)
    start_shape = jax.ShapeDtypeStruct((tiling.shape.batch, tiling.tiles, 1, width), jnp.float32)
    outputs = {
        "summary_key": (tile_shape, per_tile),
        "summary_value": (tile_shape, per_tile),
    }
    scratch = {}
    if tiling.carries:
        outputs |= {"tile_key": (start_shape, per_start), "tile_value": (start_shape, per_start)}
        scratch = {name: ((1, tiling.lanes), jnp.float32) for name in ("carry_key", "carry_value")}
    return launch(
        _summaries_kernel,
        NAME,
        tiling,
        (tiling.shape.batch, tiling.shape.num_heads, tiling.tiles),
        "ppa",
        gate_operands(tiling, projected, bias, rows, locate)
        | slot_operand(tiling, slot_ends, locate)
        | {
            name: (array, pl.BlockSpec((1, 1, tiling.slots_per_tile, tiling.lanes), table))
            for name, array in (("cos", cos), ("sin", sin))
        },
        outputs,
        scratch,
        interpret,
    )


def _summaries_kernel(tiling: Tiling, refs: types.SimpleNamespace) -> None:
    tile = pl.program_id(2)
    state = None
    if tiling.carries:

        @pl.when(tile == 0)
        def _():
            refs.carry_key[...] = jnp.zeros_like(refs.carry_key)
            refs.carry_value[...] = jnp.zeros_like(refs.carry_value)

        state = refs.carry_key[...], refs.carry_value[...]
        refs.tile_key[0, 0], refs.tile_value[0, 0] = state
    run = running(tiling, refs, tile, state)
    selection = slot_selection(tiling, refs, tile)
    key = exact_dot(selection, run.key, (1, 0))
    value = exact_dot(selection, run.value, (1, 0))
    rotated = key * refs.cos[0, 0] + swap_halves(key) * refs.sin[0, 0]
    refs.summary_key[0, 0] = rotated.astype(tiling.dtype)
    refs.summary_value[0, 0] = value.astype(tiling.dtype)
    if tiling.carries:
        refs.carry_key[...] = run.key[tiling.tile - 1 :]
        refs.carry_value[...] = run.value[tiling.tile - 1 :]
