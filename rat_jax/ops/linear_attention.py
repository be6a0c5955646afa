"""Linear attention: a matrix-valued state that only grows, read through non-negative features."""

from typing import Literal

from rat_jax.ops import linear_attention_kernels, linear_attention_xla
from rat_jax.ops.linear_attention_types import FeatureMap, LinearAttended
from rat_jax.ops.platform import check_implementation
from rat_jax.shapes import Array, Float, Float32, Int

LinearImplementation = Literal["xla", "triton", "pallas_tpu"]


def linear_attention(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    *,
    feature_map: FeatureMap,
    initial_state: Float[Array, "b n 2*H H"] | None = None,
    documents: Int[Array, "B T"] | None = None,
    state: Float32[Array, "B K 2*H H"] | None = None,
    implementation: LinearImplementation | None = None,
) -> LinearAttended:
    """out_t = phi(q_t) (S_0 + sum_{s <= t} phi(k_s)^T v_s), the sum over the s of the same document; no normaliser.

    phi(x) = [m(x), m(-x)], m the softmax over the H channels or the positive part. Head n reads key head n // (N / K).
    Features and states are float32; their products are taken in the dtype of `value`, which `out` has too, and summed
    in float32.

    Args:
      initial_state: S_0, for every row or for all together (b is B or 1), for every query or key head (n is N or K);
        None is zero.
      documents: numbers that never fall along a row; tokens of one number are one document. None: all are 0.
      state: what the tokens of document 0 before these have summed up to, without S_0; None is zero.
      implementation: the body to run; None takes the kernel of the platform that the program is lowered for where it
        takes these shapes, and "xla" elsewhere. Only "xla" takes a `state`.

    Raises:
      ValueError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    check_implementation(implementation, LinearImplementation)
    arrays = (query, key, value, initial_state, documents)
    kernel, fall_back = implementation, False
    if implementation is None:
        kernel, fall_back = linear_attention_kernels.candidate(), True
        if kernel is not None and linear_attention_kernels.refusal(kernel, *arrays, state) is not None:
            kernel = None
    if kernel in (None, "xla"):
        return linear_attention_xla.attend(feature_map, *arrays, state)
    reason = linear_attention_kernels.refusal(kernel, *arrays, state)
    if reason is not None:
        raise ValueError(f"implementation {kernel!r} cannot run this call: {reason}")
    return linear_attention_kernels.attend(kernel, fall_back, feature_map, *arrays)
