"""Where packed documents and their chunks lie, as the Triton kernels read it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.rat.seen_slots import SeenSlots, completing_tokens, continued_slots, seen_slots
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.triton_attention_backward import summaries_launch
from pallas_kernels.rat.triton_chunk_runs import chunk_runs
from pallas_kernels.rat.triton_tiling import NEVER


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Documents:
    """Places of tokens and of chunk summaries; placeholders where every row is one document from its start on."""

    positions: Any  # [B, T] int32, -1 outside of chunks
    runs: Any  # [B, T] int32: of `triton_chunk_runs.chunk_runs`
    segment_ids: Any  # [B, T] int32
    first_slots: Any  # [B, T] int32: the first slot that a chunk of the token's document, or of a later one, can lie in
    end_slots: Any  # [B, T] int32: one past the last slot that the token may see
    slot_tokens: Any  # [B, C] int32: array index of the token that completes a slot's chunk, NEVER if none does
    slot_segments: Any  # [B, C] int32: that token's document
    last_tokens: Any  # [B, ceil(C / KEYS)] int32: one past the last token that may see a block of KEYS slots
    seen: SeenSlots | None  # what other back ends than Triton's read in place of the last five

    @property
    def of_slots(self) -> tuple[Any, Any, Any, Any, Any]:
        """What the attention kernels read: places of queries, then of keys."""
        return self.segment_ids, self.first_slots, self.end_slots, self.slot_tokens, self.slot_segments

    def of_backward(self, implementation: str) -> "Documents":
        """Without the arrays that the backward pass of an implementation does not read, which are None."""
        if implementation == "triton":
            return dataclasses.replace(self, seen=None)
        unread = dict.fromkeys(field.name for field in dataclasses.fields(self))
        return Documents(**(unread | {"positions": self.positions, "runs": self.runs, "seen": self.seen}))


def documents_of(shape: RatShape, segment_ids: jax.Array | None, positions: jax.Array | None) -> Documents:
    """The places in rows that start with their first token; arguments as of `rat.rat_forward`."""
    if segment_ids is None:
        return Documents(*(jnp.zeros((1, 1), jnp.int32),) * 8, seen=None)
    if positions is None:
        raise ValueError("segment_ids need positions")
    token = jnp.arange(shape.tokens, dtype=jnp.int32)[None, :]
    is_token = segment_ids != 0
    chunk_starts = _chunk_starts(is_token, positions % shape.chunk_size == 0)
    begins = jax.lax.cummax(jnp.where(is_token & (positions == 0), token, 0), axis=1)
    first_slots = begins // shape.chunk_size
    slot_tokens = completing_tokens(shape, is_token, positions)
    slot_segments = jnp.take_along_axis(segment_ids, jnp.minimum(slot_tokens, shape.tokens - 1), axis=1)
    keys = dict(summaries_launch(shape).constants)["KEYS"]
    last_slots = jnp.minimum((jnp.arange(cdiv(shape.num_chunks, keys)) + 1) * keys, shape.num_chunks) - 1
    last_tokens = jax.vmap(lambda slots: jnp.searchsorted(slots, last_slots, side="right"))(first_slots)
    return Documents(
        *_of_runs(shape, chunk_starts, positions),
        segment_ids.astype(jnp.int32),
        first_slots,
        jnp.broadcast_to(token // shape.chunk_size + 1, first_slots.shape),
        slot_tokens,
        slot_segments,
        last_tokens.astype(jnp.int32),
        seen_slots(shape, segment_ids, positions),
    )


def continued_documents(
    shape: RatShape, segment_ids: jax.Array, positions: jax.Array, first_slots: jax.Array, held: jax.Array
) -> tuple[Documents, jax.Array, jax.Array]:
    """The places in rows that continue from the summaries of a cache, and where in it new summaries go.

    Args:
      shape: sizes.
      segment_ids: [B, T] int32, 0 is padding.
      positions: [B, T] int32, in the document, the tokens of earlier calls counted.
      first_slots: [B, T] int32, of the document's first chunk in the cache.
      held: [B, C] int32, segments of slots filled before that the row's tokens may see, 0 elsewhere.

    Returns:
      The places, in which `slot_tokens` is -1 for slots that are held; and [B, ceil(T / L)] int32, for each block of L
      tokens the slot in the cache, C where no chunk ends in the block, and the token that ends it, or `NEVER`.
    """
    is_token = segment_ids != 0
    first = is_token & (jnp.cumsum(is_token, axis=1) == 1)
    chunk_starts = _chunk_starts(is_token, first | (positions % shape.chunk_size == 0))
    capacity = held.shape[1]
    end_slots = first_slots + (positions + 1) // shape.chunk_size
    # Padding takes the place of the token before it.
    firsts, end_slots = (jax.lax.cummax(jnp.where(is_token, x, 0), axis=1) for x in (first_slots, end_slots))
    new_tokens = completing_tokens(shape, is_token, positions)
    completing = jnp.minimum(new_tokens, shape.tokens - 1)
    new_slots = jnp.take_along_axis(end_slots, completing, axis=1) - 1
    slots = jnp.where(new_tokens < NEVER, jnp.minimum(new_slots, capacity), capacity)
    rows = jnp.arange(shape.batch)[:, None]
    slot_tokens = jnp.where(held != 0, -1, NEVER).at[rows, slots].set(new_tokens, mode="drop")
    new_segments = jnp.take_along_axis(segment_ids, completing, axis=1)
    slot_segments = held.at[rows, slots].set(new_segments, mode="drop")
    places = Documents(
        *_of_runs(shape, chunk_starts, positions),
        segment_ids.astype(jnp.int32),
        firsts.astype(jnp.int32),
        jnp.minimum(end_slots, capacity).astype(jnp.int32),
        slot_tokens.astype(jnp.int32),
        slot_segments.astype(jnp.int32),
        jnp.zeros((1, 1), jnp.int32),
        continued_slots(shape, segment_ids, positions, first_slots, capacity),
    )
    return places, slots, new_tokens


def _chunk_starts(is_token: jax.Array, starts: jax.Array) -> jax.Array:
    token = jnp.arange(is_token.shape[1], dtype=jnp.int32)[None, :]
    return jnp.where(is_token, jax.lax.cummax(jnp.where(is_token & starts, token, -1), axis=1), -1)


def _of_runs(shape: RatShape, chunk_starts: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`Documents.positions` and `Documents.runs`."""
    positions = jnp.where(chunk_starts < 0, -1, positions).astype(jnp.int32)
    return positions, chunk_runs(chunk_starts, shape.chunk_size)
