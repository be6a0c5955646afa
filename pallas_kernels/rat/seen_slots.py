"""Which slots the summaries of packed documents lie in, and which of them each token sees, also in tiles.

Chunks of a document end L tokens apart, so that those that a token may see lie in neighbouring slots: `first` ..
`end` - 1. Documents follow each other, so that neither bound ever falls along a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.triton_tiling import NEVER


class SeenSlots(NamedTuple):
    """Of a call of packed documents. Slots that no token sees hold numbers, too."""

    first: Any  # [B, T] int32
    end: Any  # [B, T] int32; equal to `first` where a token sees none, as padding does


def seen_slots(shape: RatShape, segment_ids: jax.Array, positions: jax.Array) -> SeenSlots:
    """In rows that start with their first token: arguments as of `triton.rat_forward`.

    A row's first document may begin before that token.
    """
    L = shape.chunk_size
    is_token, begin = segment_ids != 0, document_begins(segment_ids)
    position = jnp.take_along_axis(positions, begin, axis=1)  # there
    document_first = (begin + L - 1 - position % L) // L  # where its first chunk ends
    end = document_first + positions // L - position // L
    end = jax.lax.cummax(jnp.where(is_token, end, 0), axis=1)
    first = jnp.where(is_token, document_first, end)
    return SeenSlots(first.astype(jnp.int32), end.astype(jnp.int32))


def continued_slots(
    shape: RatShape, segment_ids: jax.Array, positions: jax.Array, first_slots: jax.Array, capacity: int
) -> SeenSlots:
    """In a cache of `capacity` slots that holds the call's summaries, too: arguments as of `triton.rat_extend`."""
    is_token = segment_ids != 0
    end = jnp.minimum(first_slots + positions // shape.chunk_size, capacity)
    end = jax.lax.cummax(jnp.where(is_token, end, 0), axis=1)
    first = jnp.where(is_token, jnp.minimum(first_slots, end), end)
    return SeenSlots(first.astype(jnp.int32), end.astype(jnp.int32))


def document_begins(segment_ids: jax.Array) -> jax.Array:
    """[B, T] int32: array index of the first token of each token's document; of padding, of an earlier one's."""
    token = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    begins = (segment_ids != 0) & (segment_ids != jnp.pad(segment_ids, ((0, 0), (1, 0)))[:, :-1])
    return jax.lax.cummax(jnp.where(begins, token, 0), axis=1)


def completing_tokens(shape: RatShape, is_token: jax.Array, positions: jax.Array) -> jax.Array:
    """[B, ceil(T / L)] int32: array index of the token that completes a chunk, at most one in a block of L tokens."""
    token = jnp.arange(shape.tokens, dtype=jnp.int32)[None, :]
    ends = jnp.where(is_token & (positions % shape.chunk_size == shape.chunk_size - 1), token, NEVER)
    ends = jnp.pad(ends, ((0, 0), (0, shape.num_chunks * shape.chunk_size - shape.tokens)), constant_values=NEVER)
    return jnp.min(ends.reshape(shape.batch, shape.num_chunks, shape.chunk_size), axis=2)


def places(seen: SeenSlots | None, tiles: Callable[[SeenSlots], jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What kernels take: both bounds and those of tiles; placeholders of rows that are one document each."""
    return (jnp.zeros((1, 1), jnp.int32),) * 3 if seen is None else (seen.first, seen.end, tiles(seen))


def slot_tiles(seen: SeenSlots, tokens: int, slots: int) -> jax.Array:
    """[B, T / tokens, 4] int32: by blocks of tokens, bounds of tiles of slots, each from the one before on.

    Tiles before the first bound and from the last one on are seen by none of the block's tokens; those from the second
    to the third by all, whole.
    """
    first, end = (x.reshape(x.shape[0], -1, tokens) for x in (seen.first, seen.end))
    any_from, any_to = first[..., 0] // slots, -(-end[..., -1] // slots)
    return _bounds(any_from, -(-first[..., -1] // slots), end[..., 0] // slots, any_to)


def token_tiles(seen: SeenSlots, slots: int, num_blocks: int, tokens: int) -> jax.Array:
    """[B, num_blocks, 4] int32: by blocks of slots, bounds of tiles of tokens, as of `slot_tiles`."""
    first_slot = jnp.arange(num_blocks, dtype=jnp.int32) * slots
    last_slot = first_slot + slots - 1

    def tiles_before(bounds: jax.Array, slot: jax.Array, place: int) -> jax.Array:
        """How many tiles have a bound up to a slot at this place: those before the first token beyond it, counted up if
        the place is the tile's first token, down if its last. Comparing all is one small program, searching is a loop.
        """
        return jnp.sum(bounds[:, None, place::tokens] <= slot[None, :, None], axis=-1, dtype=jnp.int32)

    any_from, any_to = tiles_before(seen.end, first_slot, tokens - 1), tiles_before(seen.first, last_slot, 0)
    all_from, all_to = tiles_before(seen.end, last_slot, 0), tiles_before(seen.first, first_slot, tokens - 1)
    return _bounds(any_from, all_from, all_to, any_to)


def _bounds(any_from: jax.Array, all_from: jax.Array, all_to: jax.Array, any_to: jax.Array) -> jax.Array:
    any_to = jnp.maximum(any_from, any_to)
    all_from = jnp.clip(all_from, any_from, any_to)
    return jnp.stack([any_from, all_from, jnp.clip(all_to, all_from, any_to), any_to], axis=-1)
