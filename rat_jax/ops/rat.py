"""The RAT mixing op (arXiv 2507.04416): gated recurrence inside chunks, softmax attention across chunk summaries."""

from typing import Literal

from pallas_kernels.rat import select
from pallas_kernels.rat.shape import RatShape
from rat_jax.mesh import CONTEXT_AXIS, TENSOR_AXIS, num_parts
from rat_jax.ops import cut, dispatch, platform, rat_kernels, rat_xla
from rat_jax.ops.rat_types import RatOutput, RatState
from rat_jax.segments import SegmentInfo, as_segments, require_positions
from rat_jax.shapes import Array, Float, Float32, Int

RatImplementation = Literal["xla", "triton", "mosaic_gpu", "cudnn", "pallas_tpu"]
# Mosaic GPU's attention was the fastest at every length measured on Hopper, of whole rows and of packed documents;
# cuDNN's, faster than Triton's there from 4096 summaries on, was not measured on other cards.
_FASTEST_FIRST = ("mosaic_gpu", "triton", "pallas_tpu")


def rat_mix(
    projected: Float[Array, "B T c"],  # c = 3 D + 2 G H
    gate_bias: Float32[Array, " D"],
    segment_ids: Int[Array, "B T"] | SegmentInfo | None = None,
    *,
    num_heads: int,
    chunk_size: int,
    num_groups: int | None = None,
    rope_base: float | None = 10_000.0,
    state: RatState | None = None,
    implementation: RatImplementation | None = None,
) -> RatOutput:
    r"""Recurrence inside chunks of L = `chunk_size` tokens and attention across them: RAT (arXiv 2507.04416).

    `projected` holds, along its channels, the output gate z, the values v, the forget gate g (D each), the queries q
    and the keys k (G H each); head n uses group n mod G. With f_t = sigmoid(g_t + gate_bias), inside each chunk, from
    zero at its start,

        k~_t = f_t k~_{t-1} + (1 - f_t) k_t,      v~_t = f_t v~_{t-1} + (1 - f_t) v_t,

    and with the final pairs (K_c, V_c) of the chunks of the same document before the chunk of t,

        out_t = sigmoid(z_t) * softmax([R q_t . R K_1, ..., q_t . k~_t] / sqrt(H)) [V_1, ..., v~_t],

    where R rotates by the chunk's position in its document (`rope_base` None: not at all). Chunks are counted from the
    start of each document, so that a packed document mixes as it does alone; at padding the result is finite and has no
    meaning. The recurrence and the softmax are float32; summaries and the result have the dtype of `projected`.
    Arguments are bfloat16, float16 or float32, `gate_bias` float32.

    A mesh may cut tokens, at chunks' edges, and heads; of P parts of heads `projected` holds in turn the z, v and g of
    each part's channels and all of q and k, N / P being a multiple of G.

    Args:
      projected: z, v, g, q, k.
      gate_bias: of the forget gate.
      segment_ids: 0 is padding, which may lie before, after and between documents but not inside one; neighbours of
        the same other value are one document. None: each row is one document.
      num_heads: N.
      chunk_size: L.
      num_groups: G, a divisor of N; None: N.
      rope_base: the channel pairs (i, i + H/2) are rotated by chunk * rope_base**(-2 i / H); None: R is left out.
      state: of the tokens before these, with a `SegmentInfo` that continues from them; None where they start their rows
        and no state is wanted. Of the kernels, "triton" takes one, and "mosaic_gpu" where it is named.
      implementation: None takes the fastest kernel of the platform that the program is lowered for where it takes these
        shapes, and "xla" elsewhere. "mosaic_gpu" and "cudnn" run Triton's recurrence and replace only the attention
        over chunk summaries; of packed documents "mosaic_gpu" does, where it is named.

    Raises:
      ValueError: if sizes are out of range, the channels of `projected` or `gate_bias` do not fit the other arguments,
        or a `state` comes without a `SegmentInfo`.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, RatImplementation)
    if projected.ndim != 3:
        raise ValueError(f"projected must be [B, T, 3 D + 2 G H], got {projected.shape}")
    batch, tokens, channels = projected.shape
    dispatch.check_floating(projected=projected, gate_bias=gate_bias)
    if gate_bias.ndim != 1:
        raise ValueError(f"gate_bias must be [D], got {gate_bias.shape}")
    num_groups = num_heads if num_groups is None else num_groups
    dispatch.check_whole(
        1, num_heads=num_heads, chunk_size=chunk_size, num_groups=num_groups, tokens=tokens, rows=batch
    )
    if rope_base is not None and rope_base <= 1:
        raise ValueError(f"rope_base must be above 1, got {rope_base}")
    require_positions(state, segment_ids)
    segments = as_segments(segment_ids, (batch, tokens))
    if cut.is_cut():
        cut.refuse_state("state", state)
        parts = num_parts(TENSOR_AXIS)
        if num_heads % parts or (num_heads // parts) % num_groups:
            raise ValueError(
                f"num_heads {num_heads} over {parts} parts must be a multiple of num_groups {num_groups} on each"
            )
        own_tokens = tokens // num_parts(CONTEXT_AXIS)
        if own_tokens % chunk_size:
            raise ValueError(f"rows cut into parts of {own_tokens} tokens are not cut at the edges of {chunk_size}")
        options = {"num_heads": num_heads // parts, "num_groups": num_groups, "chunk_size": chunk_size}
        options |= {"rope_base": rope_base, "implementation": implementation}
        mixed = cut.run(
            lambda *arrays: rat_mix(*arrays, **options).out,
            ("BTN", "N", "BT"),
            "BTN",
            projected,
            gate_bias,
            segments,
        )
        return RatOutput(mixed, None)
    width = gate_bias.shape[0]
    if width % num_heads:
        raise ValueError(f"the {width} channels of gate_bias must be a multiple of num_heads, got {num_heads}")
    shape = RatShape(
        batch=dispatch.rows_of_device(batch),
        tokens=tokens,
        num_heads=num_heads,
        num_groups=num_groups,
        head_dim=width // num_heads,
        chunk_size=chunk_size,
        dtype=projected.dtype.name,
        rope_base=rope_base,
        segmented=state is not None or not segments.contiguous,
        continued=state is not None,
        capability=platform.expected_capability(),
    )
    if channels != shape.projected_width:
        raise ValueError(f"projected must have 3 D + 2 G H = {shape.projected_width} channels, got {channels}")
    chosen = dispatch.choose(implementation, _FASTEST_FIRST, batch, lambda name: select.unsupported_reason(name, shape))
    if chosen == "xla":
        return rat_xla.mix(shape, projected, gate_bias, segments, state)
    return rat_kernels.mix(chosen, implementation is None, shape, projected, gate_bias, segments, state)
