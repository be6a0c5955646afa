"""The RAT mixing op (arXiv 2507.04416): gated recurrence inside chunks, softmax attention across chunk summaries."""

from typing import Literal

from rat_jax.ops import rat_kernels, rat_xla
from rat_jax.ops.platform import check_implementation
from rat_jax.ops.rat_types import RatOutput, RatSizes, RatState
from rat_jax.segments import SegmentInfo, as_segments
from rat_jax.shapes import Array, Float, Float32, Int

RatImplementation = Literal["xla", "triton", "mosaic_gpu", "cudnn", "pallas_tpu"]


def rat_mix(
    projected: Float[Array, "B T 3*D+2*G*H"],
    gate_bias: Float32[Array, " D"],
    segment_ids: Int[Array, "B T"] | SegmentInfo | None = None,
    *,
    num_heads: int,
    num_groups: int,
    chunk_size: int,
    rope_base: float | None,
    state: RatState | None = None,
    implementation: RatImplementation | None = None,
) -> RatOutput:
    r"""Mixes tokens by recurrence inside chunks of L = `chunk_size` and by attention across them.

    `projected` holds, along its channels, the output gate z, the values v, the forget gate g (D each), the queries q
    and the keys k (G H each); head n uses group n mod G. With f_t = sigmoid(g_t + gate_bias), inside each chunk, from
    zero at its start,

        k~_t = f_t k~_{t-1} + (1 - f_t) k_t,      v~_t = f_t v~_{t-1} + (1 - f_t) v_t,

    and with the final pairs (K_c, V_c) of the chunks of the same document before the chunk of t,

        out_t = sigmoid(z_t) * softmax([R q_t . R K_1, ..., q_t . k~_t] / sqrt(H)) [V_1, ..., v~_t],

    where R rotates by the chunk's position in its document (`rope_base` None: not at all). Chunks are counted from the
    start of each document, so that a packed document mixes as it does alone; at padding the result is finite and has no
    meaning. The recurrence and the softmax are
    float32; summaries and the result have the dtype of `projected`.

    Args:
      projected: z, v, g, q, k.
      gate_bias: of the forget gate.
      segment_ids: 0 is padding, neighbours of the same other value are one document; None: each row is one document.
      num_heads: N.
      num_groups: G.
      chunk_size: L.
      rope_base: of the rotation.
      state: of the tokens before these; None where they start their rows and no state is wanted. Of the kernels, only
        "triton" takes one.
      implementation: the body to run; None takes the fastest kernel of the platform that the program is lowered for
        where it takes these shapes, and "xla" elsewhere. "mosaic_gpu" and "cudnn" are "triton" but for the attention to
        summaries.

    Raises:
      ValueError: if the channels of `projected` do not fit the other arguments, or if a named implementation cannot run
        them; the message says why and what comes nearest.
    """
    check_implementation(implementation, RatImplementation)
    segments = as_segments(segment_ids, projected.shape[:2])
    sizes = RatSizes(gate_bias.shape[0], num_heads, num_groups, chunk_size, rope_base)
    if projected.shape[-1] != sizes.projected_width:
        raise ValueError(
            f"projected must have 3 D + 2 G H = {sizes.projected_width} channels, got {projected.shape[-1]}"
        )
    if implementation == "xla":
        return rat_xla.mix(sizes, projected, gate_bias, segments, state)
    kernel, fall_back = implementation, False
    if implementation is None:
        kernel, fall_back = rat_kernels.candidate(), True
        if kernel is None or rat_kernels.refusal(kernel, sizes, projected, segments, state) is not None:
            return rat_xla.mix(sizes, projected, gate_bias, segments, state)
    reason = rat_kernels.refusal(kernel, sizes, projected, segments, state)
    if reason is not None:
        raise ValueError(f"implementation {kernel!r} cannot run this call: {reason}")
    if state is not None:
        return rat_kernels.extend(kernel, fall_back, sizes, projected, gate_bias, segments, state)
    return RatOutput(rat_kernels.mix(kernel, fall_back, sizes, projected, gate_bias, segments), None)
