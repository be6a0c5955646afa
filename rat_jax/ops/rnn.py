"""The RNN mixing op: a gated running mean over whole rows, times an output gate."""

from typing import Literal

from pallas_kernels.rnn import triton_tiling
from pallas_kernels.rnn.shape import RnnShape
from rat_jax.ops import context, cut, dispatch, rnn_kernels, rnn_xla
from rat_jax.ops.rnn_types import RnnOutput
from rat_jax.segments import SegmentInfo, as_segments, require_positions
from rat_jax.shapes import Array, Float, Float32, Int

RnnImplementation = Literal["xla", "triton"]

_FASTEST_FIRST = ("triton",)


def rnn_mix(
    projected: Float[Array, "B T c"],  # c = 3 D
    gate_bias: Float32[Array, " D"],
    segment_ids: Int[Array, "B T"] | SegmentInfo | None = None,
    *,
    state: Float32[Array, "B D"] | None = None,
    implementation: RnnImplementation | None = None,
) -> RnnOutput:
    """out_t = sigmoid(z_t) h_t, with h_t = f_t h_{t-1} + (1 - f_t) v_t, f = sigmoid(g + gate_bias) (arXiv 2507.04416).

    `projected` holds z, v, g of D channels each, in this order. h is zero before the first token of every document and
    float32; padding leaves it as it is.

    Args:
      projected: bfloat16, float16 or float32; out has its dtype.
      gate_bias: of f.
      segment_ids: 0 is padding, which may lie before, after and between documents but not inside one; neighbours of
        the same other value are one document. None: each row is one document.
      state: h after the tokens before these, with a `SegmentInfo` that continues from them; None where they start
        their rows and no state is wanted.
      implementation: None takes the fastest kernel of the platform that the program is lowered for where it takes the
        call, and "xla" elsewhere and for one token, which XLA joins with what surrounds it.

    Raises:
      ValueError: if shapes do not fit, or a `state` comes without a `SegmentInfo`.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, RnnImplementation)
    dispatch.check_floating(projected=projected, gate_bias=gate_bias)
    if projected.ndim != 3 or gate_bias.ndim != 1:
        raise ValueError(f"projected must be [B, T, 3 D] and gate_bias [D], got {projected.shape}, {gate_bias.shape}")
    batch, tokens, channels = projected.shape
    dispatch.check_whole(1, rows=batch, tokens=tokens)
    require_positions(state, segment_ids)
    segments = as_segments(segment_ids, (batch, tokens))
    if cut.is_cut():
        cut.refuse_state("state", state)
        mixed = cut.run(
            lambda *arrays: rnn_mix(*arrays, implementation=implementation).out,
            ("BTN", "N", "BT"),
            "BTN",
            projected,
            gate_bias,
            segments,
        )
        return RnnOutput(mixed, None)
    width = gate_bias.shape[0]
    if channels != 3 * width:
        raise ValueError(f"projected must have 3 D = {3 * width} channels, got {channels}")
    if state is not None and state.shape != (batch, width):
        raise ValueError(f"state must be {(batch, width)}, got {state.shape}")
    segmented = state is not None or not segments.contiguous
    shape = RnnShape(dispatch.rows_of_device(batch), tokens, width, projected.dtype.name, segmented)

    def unsupported_reason(name: str) -> str | None:
        if context.num_parts() > 1:
            return "it takes whole rows, and the mesh in use cuts them; implementation 'xla' does"
        return triton_tiling.unsupported_reason(shape)

    order = _FASTEST_FIRST if tokens > 1 else ()
    chosen = dispatch.choose(implementation, order, batch, unsupported_reason)
    if chosen == "xla":
        return rnn_xla.mix(projected, gate_bias, segments, state)
    return rnn_kernels.mix(chosen, implementation is None, shape, projected, gate_bias, segments, state)
