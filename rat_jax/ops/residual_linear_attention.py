"""Residual linear attention (arXiv 2506.15545): linear attention over what a sliding window no longer sees."""

from typing import NamedTuple

import jax.numpy as jnp

from rat_jax.ops.linear_attention import LinearImplementation, linear_attention
from rat_jax.ops.linear_attention_types import FeatureMap
from rat_jax.ops.linear_attention_xla import lagged
from rat_jax.segments import from_segments
from rat_jax.shapes import Array, Float, Float32, Int

__all__ = ["FeatureMap", "LinearImplementation", "ResidualLinearAttentionOutput", "residual_linear_attention"]


class ResidualLinearAttentionOutput(NamedTuple):
    """What each token read, and the state that the last one read."""

    out: Float[Array, "B T N H"]
    final_state: Float32[Array, "B n 2*H H"]  # n is N where the initial state is one for every query head, else K


def residual_linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    window: int,
    feature_map: FeatureMap = "softmax",
    initial_state: Float[Array, "b n 2*H H"] | None = None,
    segment_ids: Int[Array, "B T"] | None = None,
    implementation: LinearImplementation | None = None,
) -> ResidualLinearAttentionOutput:
    """out_t = phi(q_t) S_{t-W-1}, S_t = S_{t-1} + phi(k_t)^T v_t, with W = `window` (arXiv 2506.15545, section 3).

    phi(x) = [softmax(x), softmax(-x)] or [relu(x), relu(-x)] over the H channels. There is no normaliser and no decay:
    attention over a token and the W tokens before it, and this, read each past token once between them. Head n reads
    key head n // (N / K). Features and states are float32; `out` has the dtype of `value`.

    The final state is S_{T-W-2}: with the last W + 1 keys and values it is all that a row needs to go on from.

    Args:
      window: earlier tokens that are left to another branch, 0 or more; it may exceed T, and nothing is read then.
      initial_state: S_{-1}, of every row or of all together (b is B or 1), of every query head or of every key head (n
        is N or K); None is zero.
      segment_ids: 0 is padding, which changes no state and whose results have no meaning; neighbours of the same other
        value are one document, and each starts from `initial_state`. None: each row is one document.
      implementation: of `linear_attention`; None takes the fastest that there is for the platform.

    Raises:
      ValueError: if heads, window or the initial state do not fit, or a named implementation cannot run the call.
    """
    batch, tokens, heads, head_dim = query.shape
    key_heads = key.shape[2]
    _check(window, initial_state, batch, heads, key_heads, head_dim)
    key_lag, documents = min(window + 1, tokens), None  # after which a token has left the window
    if segment_ids is not None:
        segments = from_segments(segment_ids)[0]
        key, value, left = (lagged(x, key_lag) for x in (key, value, segments.segment_ids))
        value = jnp.where((segments.is_token & (left == segments.segment_ids))[..., None, None], value, 0)
        key_lag, documents = 0, jnp.cumsum(segments.starts(), axis=1, dtype=jnp.int32)
    attended = linear_attention(
        query,
        key,
        value,
        feature_map=feature_map,
        key_lag=key_lag,
        initial_state=initial_state,
        documents=documents,
        implementation=implementation,
    )
    state = attended.state
    if initial_state is not None:
        if initial_state.shape[1] == heads:
            state = jnp.repeat(state, heads // key_heads, axis=1)
        state = state + jnp.broadcast_to(initial_state.astype(jnp.float32), state.shape)
    return ResidualLinearAttentionOutput(attended.out, state)


def _check(window: int, initial_state: Array | None, batch: int, heads: int, key_heads: int, head_dim: int) -> None:
    if heads % key_heads:
        raise ValueError(f"query heads must be a multiple of key heads, got {heads} and {key_heads}")
    if window < 0:
        raise ValueError(f"window must be 0 or more, got {window}")
    if initial_state is None:
        return
    rows, states, *matrix = initial_state.shape
    if rows not in (1, batch) or states not in (key_heads, heads) or matrix != [2 * head_dim, head_dim]:
        raise ValueError(
            f"initial_state must be ({batch} or 1, {heads} or {key_heads}, {2 * head_dim}, {head_dim}), got "
            f"{initial_state.shape}"
        )
