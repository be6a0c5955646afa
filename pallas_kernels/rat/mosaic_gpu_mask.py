"""Which scores of a tile count: those of summaries that a token sees."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.mosaic_gpu import COMPUTE_GROUPS
from pallas_kernels.launch.sizes import ROWS
from pallas_kernels.rat.shape import RatShape


class Seen(NamedTuple):
    """Slots `first` .. `end` - 1 that each of some tokens sees, int32 vectors along an axis of an accumulator."""

    first: jax.Array
    end: jax.Array


def load_seen(first_slots: Any, end_slots: Any, row: jax.Array, at: pl.Slice) -> Seen:
    """Of the tokens that are the rows of accumulators, from `seen_slots.SeenSlots` in global memory."""
    return Seen(*(launch.load_rows(slots.at[row, at], 1, optimized=False) for slots in (first_slots, end_slots)))


def key_head(shape: RatShape, keys: Any, n: jax.Array) -> jax.Array:
    """Which of the heads of keys [B, C, K, H] head n reads: its own, or the one that it shares with its neighbours."""
    return lax.div(n, jnp.int32(shape.num_heads // keys.shape[2]))


class Tiles(NamedTuple):
    """Of slots, that some tokens go through: those from `whole_from` to `whole_to` all of them see whole."""

    first: Any
    whole_from: Any
    whole_to: Any
    end: Any


def tiles_of(shape: RatShape, bounds: Any, order: launch.Order, block: jax.Array, row: jax.Array, slots: int) -> Tiles:
    """Of a program's tokens, the last ones in block 0: they see most. A warpgroup may see more tiles whole.

    Args:
      shape: of the call.
      bounds: of `seen_slots.slot_tiles`, read of packed documents.
      order: of the programs.
      block: of the program.
      row: of the program.
      slots: of a tile.
    """
    if shape.segmented:
        return Tiles(*(bounds[row, order.blocks - 1 - block, i] for i in range(4)))
    first_token = (order.blocks - 1 - block) * (COMPUTE_GROUPS * ROWS)
    whole = lax.div(lax.div(first_token + lax.axis_index("group") * ROWS, shape.chunk_size), slots)
    last = lax.div(first_token + (COMPUTE_GROUPS * ROWS - 1), shape.chunk_size)
    return Tiles(0, 0, whole, launch.ceil_div(last, slots))


def token_sees_slot(
    token: jax.Array, slot: jax.Array, sizes: tuple[int, int], chunk_size: int, seen: Seen | None, *, token_axis: int
) -> jax.Array:
    """Of a tile of scores, which count.

    Args:
      token: the tile's first.
      slot: the tile's first.
      sizes: of the tile.
      chunk_size: L.
      seen: of the tile's tokens; None: the row is one document, token t of which sees slots c with (c + 1) L <= t.
      token_axis: of the tile; slots are along the other one.
    """
    slots = launch.iota(sizes, 1 - token_axis)
    if seen is None:
        return slots * chunk_size - launch.iota(sizes, token_axis) <= token - (slot + 1) * chunk_size
    first, end = (lax.broadcast_in_dim(bound - slot, sizes, [token_axis]) for bound in seen)
    return (slots >= first) & (slots < end)
