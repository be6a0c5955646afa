"""Gradients of spans of tokens, from their last one back: two kernels.

With d the gradient of `out` and a_t that of h_t through all tokens from t on:

    a_t = sigmoid(z_t) d_t + f_{t+1} a_{t+1},    dv_t = (1 - f_t) a_t,    dg_t = f_t (1 - f_t) (h_{t-1} - v_t) a_t,
    dz_t = sigmoid(z_t) (1 - sigmoid(z_t)) h_t d_t.
"""

import triton
import triton.language as tl

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch
from pallas_kernels.launch.triton_math import sigmoids
from pallas_kernels.rnn.shape import RnnShape
from pallas_kernels.rnn.triton_forward import kind_of, launch_of, load, place, rates


@triton.jit(do_not_specialize=["tokens"])
def rnn_spans_backward(
    projected,  # [B, T, 3 D]: z, v, g
    gate_bias,  # [D] float32
    kinds,  # [B, T] int32, as in the forward pass
    d_out,  # [B, T, D]
    tokens,  # T
    decays,  # [B, S, D] float32: the product of a span's f
    ends,  # [B, S, D] float32: f a of its first token, from zero after its last
    D: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """What a span makes of the gradient of its last state, of CHANNELS channels."""
    row, span, channel, at_state = place(tokens, D, SPAN, CHANNELS)
    inside = channel < D
    bias = tl.load(gate_bias + channel, mask=inside, other=0.0)
    decay, end = tl.full([CHANNELS], 1.0, tl.float32), tl.zeros([CHANNELS], tl.float32)
    for back in range(0, SPAN, PIECE):
        ahead = ()
        for i in tl.static_range(PIECE):
            token = span * SPAN + SPAN - 1 - back - i
            z = load(projected, row, token, tokens, 3 * D, channel, inside)
            gate = load(projected, row, token, tokens, 3 * D, 2 * D + channel, inside)
            d = load(d_out, row, token, tokens, D, channel, inside)
            ahead = ahead + ((z, gate, d, kind_of(kinds, row, token, tokens, SEGMENTED)),)  # noqa: RUF005
        for i in tl.static_range(PIECE):
            z, gate, d, kind = ahead[i]
            keep, _, _ = rates(gate.to(tl.float32) + bias, kind)
            opened, _ = sigmoids(z.to(tl.float32))
            decay *= keep
            end = keep * (end + opened * d.to(tl.float32))
    tl.store(decays + at_state, decay, mask=inside)
    tl.store(ends + at_state, end, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def rnn_backward(
    projected,  # [B, T, 3 D]: z, v, g
    gate_bias,  # [D] float32
    kinds,  # [B, T] int32, as in the forward pass
    d_out,  # [B, T, D]
    piece_states,  # [B, ceil(T / PIECE), D] float32: states before pieces
    after,  # [B, S, D] float32: f a of the token after a span
    tokens,  # T
    d_projected,  # [B, T, 3 D]
    d_bias,  # [B, S, D] float32
    D: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Runs back through a span piece by piece, of CHANNELS channels; within a piece forward first, for its states."""
    row, span, channel, at_state = place(tokens, D, SPAN, CHANNELS)
    inside = channel < D
    dtype = d_projected.dtype.element_ty
    bias = tl.load(gate_bias + channel, mask=inside, other=0.0)
    later = tl.load(after + at_state, mask=inside, other=0.0)
    bias_sum = tl.zeros([CHANNELS], tl.float32)
    for back in range(0, SPAN, PIECE):
        first = span * SPAN + SPAN - PIECE - back
        at_piece = (row * tl.cdiv(tokens, PIECE) + first // PIECE) * D + channel
        state = tl.load(piece_states + at_piece, mask=inside & (first < tokens), other=0.0)
        ahead = ()
        for i in tl.static_range(PIECE):
            z = load(projected, row, first + i, tokens, 3 * D, channel, inside)
            value = load(projected, row, first + i, tokens, 3 * D, D + channel, inside)
            gate = load(projected, row, first + i, tokens, 3 * D, 2 * D + channel, inside)
            d = load(d_out, row, first + i, tokens, D, channel, inside)
            kind = kind_of(kinds, row, first + i, tokens, SEGMENTED)
            ahead = ahead + ((z, value, gate, d, kind),)  # noqa: RUF005
        kept = ()
        for i in tl.static_range(PIECE):
            z, value, gate, d, kind = ahead[i]
            keep, take, slope = rates(gate.to(tl.float32) + bias, kind)
            earlier = tl.where(kind == 1, 0.0, state)
            state = keep * state + take * value.to(tl.float32)
            kept = kept + ((state, keep, take, slope * (earlier - value.to(tl.float32))),)  # noqa: RUF005
        for i in tl.static_range(PIECE):
            z, value, gate, d, kind = ahead[PIECE - 1 - i]
            state, keep, take, slope = kept[PIECE - 1 - i]
            opened, closed = sigmoids(z.to(tl.float32))
            d = d.to(tl.float32)
            later += opened * d
            to = d_projected + (row * tokens + first + PIECE - 1 - i) * (3 * D) + channel
            use = inside & (first + PIECE - 1 - i < tokens)
            tl.store(to, (opened * closed * state * d).to(dtype), mask=use)
            tl.store(to + D, (take * later).to(dtype), mask=use)
            tl.store(to + 2 * D, (slope * later).to(dtype), mask=use)
            bias_sum += slope * later
            later *= keep
    tl.store(d_bias + at_state, bias_sum, mask=inside)


def spans_launch(shape: RnnShape, span: int) -> Launch:
    """`rnn_spans_backward`; the inputs are those of the kernel in their order."""
    states = (shape.batch, cdiv(shape.tokens, span), shape.width)
    return launch_of(rnn_spans_backward, shape, span, ((states, "float32"), (states, "float32")))


def backward_launch(shape: RnnShape, span: int) -> Launch:
    """`rnn_backward`; the inputs are those of the kernel in their order."""
    outputs = (
        ((shape.batch, shape.tokens, 3 * shape.width), shape.dtype),
        ((shape.batch, cdiv(shape.tokens, span), shape.width), "float32"),
    )
    return launch_of(rnn_backward, shape, span, outputs)
