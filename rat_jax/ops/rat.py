"""The RAT mixing op (arXiv 2507.04416): gated recurrence inside chunks, softmax attention across chunk summaries."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.layout import TokenLayout
from rat_jax.ops.attention import Place, attention
from rat_jax.ops.recurrence import gated_recurrence
from rat_jax.ops.rope import rotate
from rat_jax.shapes import Array, Float, Float32, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RatState:
    """What later tokens need to know of a row: the running pair and the summaries of all full chunks.

    A chunk that its document ended inside is never attended to, so that T tokens leave at most T // L summaries.
    """

    key: Float32[Array, "B N H"]  # running k~, not rotated
    value: Float32[Array, "B N H"]  # running v~
    summary_key: Float[Array, "B C N H"]  # rotated by the chunk's position in its document
    summary_value: Float[Array, "B C N H"]
    summary_segment_ids: Int[Array, "B C"]  # 0 where no summary has been written
    num_summaries: Int[Array, " B"]

    @classmethod
    def empty(
        cls, batch_size: int, capacity: int, num_heads: int, head_dim: int, chunk_size: int, dtype: jnp.dtype
    ) -> "RatState":
        """The state before the first token, with room for `capacity` tokens a row."""
        chunks = max(1, capacity // chunk_size)
        running = jnp.zeros((batch_size, num_heads, head_dim), jnp.float32)
        summaries = jnp.zeros((batch_size, chunks, num_heads, head_dim), dtype)
        return cls(
            key=running,
            value=running,
            summary_key=summaries,
            summary_value=summaries,
            summary_segment_ids=jnp.zeros((batch_size, chunks), jnp.int32),
            num_summaries=jnp.zeros((batch_size,), jnp.int32),
        )


class RatMixed(NamedTuple):
    """The mixed tokens and, where a state was given, the state after them."""

    out: Float[Array, "B T D"]
    state: RatState | None


def rat_mix(
    projected: Float[Array, "B T 3*D+2*G*H"],
    gate_bias: Float32[Array, " D"],
    layout: TokenLayout,
    *,
    num_heads: int,
    num_groups: int,
    chunk_size: int,
    rope_base: float | None,
    state: RatState | None = None,
) -> RatMixed:
    r"""Mixes tokens by recurrence inside chunks of L = `chunk_size` and by attention across them.

    `projected` holds, along its channels, the output gate z, the values v, the forget gate g (D each), the queries q
    and the keys k (G H each); head n uses group n mod G. With f_t = sigmoid(g_t + gate_bias), inside each chunk, from
    zero at its start,

        k~_t = f_t k~_{t-1} + (1 - f_t) k_t,      v~_t = f_t v~_{t-1} + (1 - f_t) v_t,

    and with the final pairs (K_c, V_c) of the chunks of the same document before the chunk of t,

        out_t = sigmoid(z_t) * softmax([R q_t . R K_1, ..., q_t . k~_t] / sqrt(H)) [V_1, ..., v~_t],

    where R rotates by the chunk's position in its document (`rope_base` None: not at all). Chunks are counted from the
    start of each document, so that a packed document mixes as it does alone. The recurrence and the softmax are
    float32; summaries and the result have the dtype of `projected`.

    Args:
      state: of the tokens before these; None where they start their rows and no state is wanted.

    Raises:
      ValueError: if the channels of `projected` do not fit the other arguments.
    """
    batch, tokens, channels = projected.shape
    width = gate_bias.shape[0]
    head_dim = width // num_heads
    expected = 3 * width + 2 * num_groups * head_dim
    if channels != expected:
        raise ValueError(f"projected must have 3 D + 2 G H = {expected} channels, got {channels}")
    z, value, gate, query, key = jnp.split(
        projected, [width, 2 * width, 3 * width, 3 * width + num_groups * head_dim], axis=-1
    )
    heads = (batch, tokens, num_heads, head_dim)
    value, gate = value.reshape(heads), gate.astype(jnp.float32).reshape(heads) + gate_bias.reshape(1, 1, *heads[2:])
    query, key = (
        jnp.tile(x.reshape(batch, tokens, num_groups, head_dim), (1, 1, num_heads // num_groups, 1))
        for x in (query, key)
    )

    with jax.named_scope("chunk_recurrence"):
        scan = {
            "starts": layout.starts(chunk_size),
            "is_token": layout.is_token,
            "block_size": min(chunk_size, 256),
        }
        running_key = gated_recurrence(gate, key, initial_state=None if state is None else state.key, **scan)
        running_value = gated_recurrence(gate, value, initial_state=None if state is None else state.value, **scan)
    with jax.named_scope("chunk_summaries"):
        summaries = _summarise(running_key, running_value, layout, chunk_size, rope_base, projected.dtype)
    with jax.named_scope("chunk_attention"):
        own_score = jnp.einsum("btnh,btnh->btn", query.astype(jnp.float32), running_key) * head_dim**-0.5
        if rope_base is not None:
            query = rotate(query, layout.positions // chunk_size, rope_base)
        mixed = _attend(query, own_score, running_value, layout, summaries, state)
    out = (jax.nn.sigmoid(z.astype(jnp.float32)) * mixed.reshape(batch, tokens, width)).astype(projected.dtype)
    if state is not None:
        state = _extend(state, running_key[:, -1], running_value[:, -1], summaries)
    return RatMixed(out, state)


class _Summaries(NamedTuple):
    """One slot for each L tokens of the call: at most one chunk is completed among them."""

    key: Float[Array, "B C N H"]
    value: Float[Array, "B C N H"]
    segment_ids: Int[Array, "B C"]  # 0: no chunk is completed among these tokens
    order: Int[Array, "B C"]  # of the token that completed the chunk


def _summarise(
    running_key: Array,
    running_value: Array,
    layout: TokenLayout,
    chunk_size: int,
    rope_base: float | None,
    dtype: jnp.dtype,
) -> _Summaries:
    batch, tokens = layout.positions.shape
    size = min(chunk_size, tokens)
    blocks = -(-tokens // size)
    ends = jnp.pad(layout.ends(chunk_size), [(0, 0), (0, blocks * size - tokens)]).reshape(batch, blocks, size)
    found = ends.any(axis=-1)
    if layout.contiguous:
        at = jnp.minimum(jnp.arange(size - 1, blocks * size, size), tokens - 1)
        at = jnp.broadcast_to(at, (batch, blocks))
        key, value = running_key[:, at[0]], running_value[:, at[0]]
    else:
        at = jnp.arange(0, blocks * size, size)[None] + jnp.argmax(ends, axis=-1)
        key, value = (jnp.take_along_axis(x, at[:, :, None, None], axis=1) for x in (running_key, running_value))

    def pick(x):
        return jnp.take_along_axis(x, at, axis=1)

    if rope_base is not None:
        key = rotate(key, pick(layout.positions) // chunk_size, rope_base)
    return _Summaries(
        key=key.astype(dtype),
        value=value.astype(dtype),
        segment_ids=jnp.where(found, pick(layout.segment_ids), 0),
        order=pick(layout.order),
    )


def _attend(
    query: Array,
    own_score: Array,
    own_value: Array,
    layout: TokenLayout,
    summaries: _Summaries,
    state: RatState | None,
) -> Float32[Array, "B T N H"]:
    """Softmax over the summaries before each token and the token's own pair."""
    sources = [(summaries.key, summaries.value, summaries.segment_ids, summaries.order + 1)]  # + 1: strictly earlier
    if state is not None:
        before_all = jnp.full_like(state.summary_segment_ids, -1)
        sources.insert(0, (state.summary_key, state.summary_value, state.summary_segment_ids, before_all))
        if query.shape[1] == 1:  # a single token sees no summary of its own call
            sources.pop()
    key, value, segment_ids, order = (
        jnp.concatenate(x, axis=1) if len(x) > 1 else x[0] for x in zip(*sources, strict=True)
    )
    earlier = attention(
        query,
        key,
        value,
        query_place=Place(layout.segment_ids, layout.order),
        key_place=Place(segment_ids, order),
    )
    # Two softmaxes over disjoint keys join by their log-sum-exps; one over a single key has the score itself.
    own_weight = jax.nn.sigmoid(own_score - earlier.log_sum_exp)[..., None]
    return own_weight * own_value + (1.0 - own_weight) * earlier.out.astype(jnp.float32)


def _extend(state: RatState, running_key: Array, running_value: Array, summaries: _Summaries) -> RatState:
    """Appends the completed chunks of a call; what does not fit the capacity is dropped."""
    found = summaries.segment_ids != 0
    slots = state.num_summaries[:, None] + jnp.cumsum(found, axis=1, dtype=jnp.int32) - 1
    slots = jnp.where(found, slots, state.summary_key.shape[1])
    rows = jnp.arange(slots.shape[0])[:, None]

    def write(old, new):
        return old.at[rows, slots].set(new, mode="drop")

    return RatState(
        key=running_key,
        value=running_value,
        summary_key=write(state.summary_key, summaries.key),
        summary_value=write(state.summary_value, summaries.value),
        summary_segment_ids=write(state.summary_segment_ids, summaries.segment_ids),
        num_summaries=state.num_summaries + found.sum(axis=1, dtype=jnp.int32),
    )
