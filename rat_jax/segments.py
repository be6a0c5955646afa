"""Segments: which document each token of a call belongs to, its position there, its index in the row.

Every mixer reads the same description, so that document boundaries and padding mean the same thing to all of them.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rat_jax.shapes import Array, Bool, Int, Shaped

PADDING = 0  # the segment id of tokens that are not there


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SegmentInfo:
    """Documents, positions and indices of the tokens of one call, shape [B, T] each.

    A document is a run of tokens with one non-zero segment id; the next document has another. Padding (segment 0) may
    come before, after or between documents, not inside one.
    """

    segment_ids: Int[Array, "B T"]  # documents of the row are numbered 1, 2, ..., so that no number comes again
    positions: Int[Array, "B T"]  # counted from the start of the token's document
    token_index: Int[Array, "B T"]  # counted over all tokens of the row that are not padding, earlier calls included
    contiguous: bool = dataclasses.field(metadata={"static": True})
    """Known when tracing: every row is one document from its position 0 on, without padding."""

    @property
    def is_token(self) -> Bool[Array, "B T"]:
        return self.segment_ids != PADDING

    def starts(self, period: int | None = None) -> Bool[Array, "B T"]:
        """True at the first token of every document, and then of every `period` tokens of it."""
        offsets = self.positions if period is None else self.positions % period
        return (offsets == 0) & self.is_token

    def ends(self, period: int) -> Bool[Array, "B T"]:
        """True at the last token of every full run of `period` tokens of a document."""
        return (self.positions % period == period - 1) & self.is_token

    # Caches keep what tokens leave in slots: token t of the row in slot t, or what it leaves at the end of a run of
    # `period` tokens of its document in slot (t + 1) // period - 1. Such ends are `period` tokens apart or more, so
    # that each has a slot of its own, and those of a document are neighbours. What a slot holds follows from where the
    # row and its document are: no layer keeps a record of it.

    def first_slots(self, period: int = 1) -> Int[Array, "B T"]:
        """The slot of the first run of each token's document; that of its run c lies c further."""
        return (self.token_index - self.positions) // period

    def held(self, num_slots: int, period: int = 1) -> Int[Array, "B S"]:
        """Documents of what slots held before the call, 0 where none of its tokens may see it.

        They are those of the document that the row's first token continues.
        """
        segment_id, position, index = self._continued
        begin, slots = (index - position) // period, jnp.arange(num_slots, dtype=jnp.int32)[None]
        return jnp.where((slots >= begin) & (slots < begin + position // period), segment_id, PADDING)

    def held_in_ring(self, num_slots: int) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
        """As `held` where token t is in slot t mod S and replaces the one before it; also which token a slot holds."""
        segment_id, position, index = self._continued
        last, slots = index - 1, jnp.arange(num_slots, dtype=jnp.int32)[None]
        held_index = last - (last - slots) % num_slots
        return jnp.where(held_index >= index - position, segment_id, PADDING), held_index

    @property
    def _continued(self) -> tuple[Int[Array, "B 1"], Int[Array, "B 1"], Int[Array, "B 1"]]:
        """Segment, position and index of each row's first token; where a row has none it continues no document."""
        first = jnp.argmax(self.is_token, axis=1)[:, None]
        segment_id, position, index = (
            jnp.take_along_axis(x, first, axis=1) for x in (self.segment_ids, self.positions, self.token_index)
        )
        return segment_id, jnp.where(segment_id == PADDING, 0, position), index


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StreamState:
    """Where each row ended after the last call: what the next call continues from."""

    segment_id: Int[Array, " B"]  # of the last token, as the caller gave it; 0 before the first
    num_documents: Int[Array, " B"]  # so far
    position: Int[Array, " B"]  # of the next token, should it belong to the same document
    num_tokens: Int[Array, " B"]  # so far, padding not counted

    @classmethod
    def empty(cls, batch_size: int) -> "StreamState":
        zeros = jnp.zeros((batch_size,), jnp.int32)
        return cls(segment_id=zeros, num_documents=zeros, position=zeros, num_tokens=zeros)


def write_slots(slots: Int[Array, "B T"], kept: Shaped[Array, "B S *axes"], new: Shaped[Array, "B T *axes"]) -> Array:
    """What a cache keeps with new values in these slots; those of slots from S on are dropped."""
    return kept.at[jnp.arange(slots.shape[0])[:, None], slots].set(new, mode="drop")


def as_segments(segment_ids: Int[Array, "B T"] | SegmentInfo | None, shape: tuple[int, int]) -> SegmentInfo:
    """What segment ids say of [B, T] tokens that start their rows; None: each row is one document without padding.

    A `SegmentInfo` comes back as it is, so that a model works one out once for all its layers.

    Raises:
      ValueError: if the ids have another shape or are no whole numbers.
    """
    if segment_ids is None:
        return whole_rows(*shape)
    is_known = isinstance(segment_ids, SegmentInfo)
    check_shape(segment_ids.segment_ids if is_known else segment_ids, shape)
    return segment_ids if is_known else from_segments(segment_ids)[0]


def check_shape(segment_ids: Array, shape: tuple[int, int]) -> None:
    """Raises ValueError if segment ids are not whole numbers, one for each of [B, T] tokens."""
    if segment_ids.shape != tuple(shape):
        raise ValueError(f"segment_ids must have the tokens' shape {tuple(shape)}, got {segment_ids.shape}")
    if not (jnp.issubdtype(segment_ids.dtype, jnp.integer) or segment_ids.dtype == jnp.bool_):
        raise ValueError(f"segment_ids must be whole numbers, got {segment_ids.dtype}")


def check_tokens(tokens: Array) -> None:
    """Raises ValueError if tokens are not whole numbers [B, T]."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be whole numbers [B, T], got {tokens.dtype} {tokens.shape}")


def require_continuing(name: str, state: object | None, segment_ids: Array | SegmentInfo | None) -> None:
    """Refuses a state from earlier tokens beside ids that start every document anew.

    Raises:
      ValueError: naming the state's argument.
    """
    if state is not None and segment_ids is not None and not isinstance(segment_ids, SegmentInfo):
        raise ValueError(
            f"segment_ids alone start every document in this call, so that nothing continues from {name}; pass a "
            f"SegmentInfo (rat_jax.segments.from_segments) that says which documents began earlier"
        )


def require_positions(state: object | None, segment_ids: Array | SegmentInfo | None) -> None:
    """Refuses a state without the positions that its rows go on from.

    Raises:
      ValueError: if there is a state, and no `SegmentInfo`.
    """
    if state is not None and not isinstance(segment_ids, SegmentInfo):
        raise ValueError(
            "a state holds no positions: give a SegmentInfo (rat_jax.segments.from_segments) that continues the rows"
        )


def whole_rows(batch_size: int, num_tokens: int) -> SegmentInfo:
    """The segments of rows that are one document each, from its start, without padding."""
    indices = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32), (batch_size, num_tokens))
    return SegmentInfo(segment_ids=jnp.ones_like(indices), positions=indices, token_index=indices, contiguous=True)


def from_segments(segment_ids: Int[Array, "B T"], end: StreamState | None = None) -> tuple[SegmentInfo, StreamState]:
    """What segment ids describe, in rows that continue from `end` (None: nothing came before), and where they end."""
    segment_ids = segment_ids.astype(jnp.int32)
    if end is None:
        end = StreamState.empty(segment_ids.shape[0])
    is_token = segment_ids != PADDING
    seen = jnp.cumsum(is_token, axis=1, dtype=jnp.int32)  # tokens of this call up to and with this one
    earlier = end.segment_id[:, None]
    # The segment of the last token before each one, over padding: ids of tokens carried forward.
    indices = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None]
    last_token = jax.lax.cummax(jnp.where(is_token, indices, -1), axis=1)
    before = jnp.concatenate([jnp.full_like(last_token[:, :1], -1), last_token[:, :-1]], axis=1)
    segment_before = jnp.where(before < 0, earlier, jnp.take_along_axis(segment_ids, jnp.maximum(before, 0), axis=1))
    starts = is_token & (segment_ids != segment_before)
    # `seen` at the start of the running document; a document that began in an earlier call started before this one.
    origin = jax.lax.cummax(jnp.where(starts, seen - 1, jnp.iinfo(jnp.int32).min), axis=1)
    origin = jnp.maximum(origin, -end.position[:, None])
    positions = jnp.where(is_token, seen - 1 - origin, 0)
    order = end.num_tokens[:, None] + seen - 1
    documents = end.num_documents[:, None] + jnp.cumsum(starts, axis=1, dtype=jnp.int32)
    numbered = jnp.where(is_token, documents, PADDING)
    segments = SegmentInfo(segment_ids=numbered, positions=positions, token_index=order, contiguous=False)
    any_token = last_token[:, -1] >= 0
    last = jnp.maximum(last_token[:, -1:], 0)
    new_end = StreamState(
        segment_id=jnp.where(any_token, jnp.take_along_axis(segment_ids, last, axis=1)[:, 0], end.segment_id),
        num_documents=documents[:, -1],
        position=jnp.where(any_token, jnp.take_along_axis(positions, last, axis=1)[:, 0] + 1, end.position),
        num_tokens=end.num_tokens + seen[:, -1],
    )
    return segments, new_end
