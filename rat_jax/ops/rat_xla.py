"""The RAT mixing op in plain XLA: it runs everywhere, with caches; kernels are compared with it."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.rat.shape import RatShape
from rat_jax.ops import context
from rat_jax.ops.attention import KeyInfo, attention
from rat_jax.ops.rat_types import RatOutput, RatState
from rat_jax.ops.recurrence import gated_recurrence
from rat_jax.ops.rope import rotate
from rat_jax.segments import SegmentInfo, write_slots
from rat_jax.shapes import Array, Float, Float32, Int


def mix(
    shape: RatShape,
    projected: Float[Array, "B T c"],  # c = 3 D + 2 G H
    gate_bias: Float32[Array, " D"],
    segments: SegmentInfo,
    state: RatState | None = None,
) -> RatOutput:
    """See `rat_jax.ops.rat.rat_mix`; memory grows with T, not with T C."""
    batch, tokens, _ = projected.shape
    width, head_dim, chunk_size = shape.width, shape.head_dim, shape.chunk_size
    z, value, gate, query, key = jnp.split(
        projected, [width, 2 * width, 3 * width, 3 * width + shape.num_groups * head_dim], axis=-1
    )
    heads = (batch, tokens, shape.num_heads, head_dim)
    value, gate = value.reshape(heads), gate.astype(jnp.float32).reshape(heads) + gate_bias.reshape(1, 1, *heads[2:])
    query, key = (
        jnp.tile(x.reshape(batch, tokens, shape.num_groups, head_dim), (1, 1, shape.num_heads // shape.num_groups, 1))
        for x in (query, key)
    )
    with jax.named_scope("chunk_recurrence"):
        scan = {"segment_ids": segments, "chunk_size": chunk_size, "block_size": min(chunk_size, 256)}
        running_key = gated_recurrence(gate, key, initial_state=None if state is None else state.key, **scan)
        running_value = gated_recurrence(gate, value, initial_state=None if state is None else state.value, **scan)
    with jax.named_scope("chunk_summaries"):
        summaries = _summarise(shape, running_key, running_value, segments, projected.dtype)
        if context.num_parts() > 1:
            summaries = context.gather(summaries)
    with jax.named_scope("chunk_attention"):
        current_score = jnp.einsum("btnh,btnh->btn", query.astype(jnp.float32), running_key) * head_dim**-0.5
        if shape.rope_base is not None:
            query = rotate(query, segments.positions // chunk_size, shape.rope_base)
        extended = None if state is None else _extend(state, running_key[:, -1], running_value[:, -1], summaries)
        mixed = _attend(chunk_size, query, current_score, running_value, segments, summaries, state, extended)
    out = (jax.nn.sigmoid(z.astype(jnp.float32)) * mixed.reshape(batch, tokens, width)).astype(projected.dtype)
    return RatOutput(out, extended)


class _Summaries(NamedTuple):
    """One summary index for each L tokens of the call: at most one chunk is completed among them."""

    key: Float[Array, "B C N H"]
    value: Float[Array, "B C N H"]
    segment_ids: Int[Array, "B C"]  # 0: no chunk is completed among these tokens
    token_index: Int[Array, "B C"]  # of the token that completed the chunk
    slots: Int[Array, "B C"]  # where a state keeps them; of no meaning where no chunk is completed


def _summarise(
    shape: RatShape, running_key: Array, running_value: Array, segments: SegmentInfo, dtype: jnp.dtype
) -> _Summaries:
    batch, tokens = segments.positions.shape
    chunk_size = shape.chunk_size
    size = min(chunk_size, tokens)
    blocks = -(-tokens // size)
    ends = jnp.pad(segments.ends(chunk_size), [(0, 0), (0, blocks * size - tokens)]).reshape(batch, blocks, size)
    found = ends.any(axis=-1)
    if segments.contiguous:
        at = jnp.minimum(jnp.arange(size - 1, blocks * size, size), tokens - 1)
        at = jnp.broadcast_to(at, (batch, blocks))
        key, value = running_key[:, at[0]], running_value[:, at[0]]
    else:
        at = jnp.arange(0, blocks * size, size)[None] + jnp.argmax(ends, axis=-1)
        key, value = (jnp.take_along_axis(x, at[:, :, None, None], axis=1) for x in (running_key, running_value))

    def pick(x):
        return jnp.take_along_axis(x, at, axis=1)

    if shape.rope_base is not None:
        key = rotate(key, pick(segments.positions) // chunk_size, shape.rope_base)
    return _Summaries(
        key=key.astype(dtype),
        value=value.astype(dtype),
        segment_ids=jnp.where(found, pick(segments.segment_ids), 0),
        token_index=pick(segments.token_index),
        slots=pick(segments.first_slots(chunk_size) + segments.positions // chunk_size),
    )


def _attend(
    chunk_size: int,
    query: Array,
    current_score: Array,
    own_value: Array,
    segments: SegmentInfo,
    summaries: _Summaries,
    state: RatState | None,
    extended: RatState | None,
) -> Float32[Array, "B T N H"]:
    """Softmax over the summaries before each token and the current token's pair."""
    after = summaries.token_index + 1  # strictly earlier summaries alone are seen
    sources = [(summaries.key, summaries.value, summaries.segment_ids, after)]
    if state is not None:
        held = segments.held(state.summary_key.shape[1], chunk_size)
        before_all = jnp.full_like(held, -1)
        if query.shape[1] == 1:
            # A single token sees no summary of its own call. The new arrays are read, where the old ones are held: were
            # the old ones still read after the write, a loop over steps would copy all summaries at each.
            sources = [(extended.summary_key, extended.summary_value, held, before_all)]
        else:
            sources.insert(0, (state.summary_key, state.summary_value, held, before_all))
    key, value, segment_ids, order = (
        jnp.concatenate(x, axis=1) if len(x) > 1 else x[0] for x in zip(*sources, strict=True)
    )
    earlier = attention(
        query,
        key,
        value,
        query_info=KeyInfo(segments.segment_ids, segments.token_index),
        key_info=KeyInfo(segment_ids, order),
        implementation="xla",
    )
    # Two softmaxes over disjoint keys join by their log-sum-exps; one over a single key has the score itself.
    current_weight = jax.nn.sigmoid(current_score - earlier.log_sum_exp)[..., None]
    return current_weight * own_value + (1.0 - current_weight) * earlier.out.astype(jnp.float32)


def _extend(state: RatState, running_key: Array, running_value: Array, summaries: _Summaries) -> RatState:
    """Appends the completed chunks of a call; what does not fit the capacity is dropped."""
    slots = jnp.where(summaries.segment_ids != 0, summaries.slots, state.summary_key.shape[1])
    return RatState(
        key=running_key,
        value=running_value,
        summary_key=write_slots(slots, state.summary_key, summaries.key),
        summary_value=write_slots(slots, state.summary_value, summaries.value),
    )
