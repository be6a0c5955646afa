"""Residual linear attention (arXiv 2506.15545): linear attention over what a sliding window no longer sees."""

from typing import NamedTuple

import jax.numpy as jnp

from rat_jax.ops import dispatch
from rat_jax.ops.linear_attention import LinearImplementation, linear_attention
from rat_jax.ops.linear_attention_types import FeatureMap
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32, Int

__all__ = ["FeatureMap", "LinearImplementation", "ResidualLinearAttentionOutput", "residual_linear_attention"]


class ResidualLinearAttentionOutput(NamedTuple):
    """What each token read, and the state that the last one read."""

    out: Float[Array, "B T N H"]
    final_state: Float32[Array, "B n E H"]  # n is N where the initial state is one for every query head, else K


def residual_linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    window: int,
    feature_map: FeatureMap = "softmax",
    initial_state: Float[Array, "b n E H"] | None = None,
    segment_ids: Int[Array, "B T"] | SegmentInfo | None = None,
    implementation: LinearImplementation | None = None,
) -> ResidualLinearAttentionOutput:
    """out_t = phi(q_t) S_{t-W-1}, S_t = S_{t-1} + phi(k_t)^T v_t, with W = `window` (arXiv 2506.15545, section 3).

    phi(x) = [softmax(x), softmax(-x)] or [relu(x), relu(-x)] over the H channels. There is no normaliser and no decay.
    Together with attention over the window every past token is read exactly once. Head n reads key head n // (N / K).
    Features and states are float32; `out` has the dtype of `value` (float32, bfloat16 or float16).

    The final state is S_{T-W-2}: with the last W + 1 keys and values it is all that a row needs to resume.

    Args:
      query, key, value: q, k, v.
      window: earlier tokens that are left to another branch, 0 or more; it may exceed T, and nothing is read then.
      feature_map: "softmax" or "relu".
      initial_state: S_{-1}, of every row or of all together (b is B or 1), of every query head or of every key head (n
        is N or K); None is zero.
      segment_ids: 0 is padding, which changes no state and whose results have no meaning; it may lie before, after and
        between documents but not inside one, where the window would count it as tokens. Neighbours of the same other
        value are one document, and each starts from `initial_state`. None: each row is one document.
      implementation: of `linear_attention`; None takes the fastest that there is for the platform.

    Raises:
      ValueError: if heads, window or the initial state do not fit.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_heads(query=query, key=key, value=value)
    dispatch.check_whole(0, window=window)
    heads, key_heads = query.shape[2], key.shape[2]
    attended = linear_attention(
        query,
        key,
        value,
        feature_map=feature_map,
        key_lag=min(window + 1, query.shape[1]),  # after which a token has left the window
        segment_ids=segment_ids,
        initial_state=initial_state,
        implementation=implementation,
    )
    state = attended.state
    if initial_state is not None:
        if initial_state.shape[1] == heads:
            state = jnp.repeat(state, heads // key_heads, axis=1)
        state = state + jnp.broadcast_to(initial_state.astype(jnp.float32), state.shape)
    return ResidualLinearAttentionOutput(attended.out, state)
