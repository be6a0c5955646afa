"""Linear attention: a matrix-valued state that only grows, read through non-negative features."""

import functools
from typing import Literal

from rat_jax.ops import linear_attention_kernels, linear_attention_xla
from rat_jax.ops.linear_attention_types import FeatureMap, LinearAttentionOutput
from rat_jax.ops.platform import check_implementation
from rat_jax.shapes import Array, Float, Float32, Int

LinearImplementation = Literal["xla", "triton", "mosaic_gpu", "pallas_tpu"]


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    feature_map: FeatureMap,
    key_lag: int = 0,
    initial_state: Float[Array, "b n 2*H H"] | None = None,
    documents: Int[Array, "B T"] | None = None,
    state: Float32[Array, "B K 2*H H"] | None = None,
    implementation: LinearImplementation | None = None,
) -> LinearAttentionOutput:
    """out_t = phi(q_t) (S_0 + sum_{s <= t - key_lag} phi(k_s)^T v_s), over the s of the same document; no normaliser.

    phi(x) = [m(x), m(-x)], m the softmax over the H channels or the positive part. Head n reads key head n // (N / K).
    Features and states are float32; their products are taken in the dtype of `value`, which `out` has too, and summed
    in float32.

    Args:
      key_lag: tokens after which a key and its value are seen; without documents only.
      initial_state: S_0, for every row or for all together (b is B or 1), for every query or key head (n is N or K);
        None is zero.
      documents: numbers that never fall along a row; tokens of one number are one document. None: all are 0.
      state: what the tokens of document 0 before these have summed up to, without S_0; None is zero.
      implementation: the body to run; None takes the fastest kernel for the platform that the program is lowered for
        that takes these shapes, and "xla" where there is none. Only "xla" takes a `state`.

    Raises:
      ValueError: if a key_lag meets documents, or a named implementation cannot run the call; the message says why and
        what comes nearest.
    """
    check_implementation(implementation, LinearImplementation)
    if key_lag and documents is not None:
        raise ValueError(f"a key_lag ({key_lag}) is not taken together with documents; shift keys and values instead")
    arrays = (query, key, value, initial_state, documents)
    kernel, fall_back = implementation, implementation is None
    if implementation is None:
        refused = functools.partial(linear_attention_kernels.refusal, state=state)
        taken = (kernel for kernel in linear_attention_kernels.candidates() if refused(kernel, *arrays) is None)
        kernel = next(taken, "xla")
    if kernel == "xla":
        return linear_attention_xla.attend(feature_map, key_lag, *arrays, state)
    reason = linear_attention_kernels.refusal(kernel, *arrays, state)
    if reason is not None:
        raise ValueError(f"implementation {kernel!r} cannot run this call: {reason}")
    if kernel not in linear_attention_kernels.TAKE_KEY_LAG:
        key, value = (linear_attention_xla.lagged(x, key_lag) for x in (key, value))
        key_lag = 0
    return linear_attention_kernels.attend(kernel, fall_back, feature_map, key_lag, query, key, value, *arrays[3:])
