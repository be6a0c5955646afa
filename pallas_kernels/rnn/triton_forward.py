"""The recurrence of spans of tokens, from their first one on: two kernels."""

import triton
import triton.language as tl

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch
from pallas_kernels.launch.triton_math import sigmoids
from pallas_kernels.rnn.shape import RnnShape
from pallas_kernels.rnn.triton_tiling import CHANNELS, PIECE


@triton.jit(do_not_specialize=["tokens"])
def rnn_spans_forward(
    projected,  # [B, T, 3 D]: z, v, g
    gate_bias,  # [D] float32
    kinds,  # [B, T] int32: 1 begins a document, 2 is padding; read only if SEGMENTED
    tokens,  # T
    decays,  # [B, S, D] float32: the product of a span's f
    ends,  # [B, S, D] float32: its last state, from zero before it
    D: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """What a span makes of the state before it, of CHANNELS channels."""
    row, span, channel, at_state = place(tokens, D, SPAN, CHANNELS)
    inside = channel < D
    bias = tl.load(gate_bias + channel, mask=inside, other=0.0)
    decay, end = tl.full([CHANNELS], 1.0, tl.float32), tl.zeros([CHANNELS], tl.float32)
    for start in range(0, SPAN, PIECE):
        ahead = ()
        for i in tl.static_range(PIECE):
            token = span * SPAN + start + i
            value = load(projected, row, token, tokens, 3 * D, D + channel, inside)
            gate = load(projected, row, token, tokens, 3 * D, 2 * D + channel, inside)
            ahead = ahead + ((value, gate, kind_of(kinds, row, token, tokens, SEGMENTED)),)  # noqa: RUF005
        for i in tl.static_range(PIECE):
            value, gate, kind = ahead[i]
            keep, take, _ = rates(gate.to(tl.float32) + bias, kind)
            decay *= keep
            end = keep * end + take * value.to(tl.float32)
    tl.store(decays + at_state, decay, mask=inside)
    tl.store(ends + at_state, end, mask=inside)


@triton.jit(do_not_specialize=["tokens"])
def rnn_forward(
    projected,  # [B, T, 3 D]: z, v, g
    gate_bias,  # [D] float32
    kinds,  # [B, T] int32, as above
    before,  # [B, S, D] float32: states before spans
    tokens,  # T
    out,  # [B, T, D]
    piece_states,  # [B, ceil(T / PIECE), D] float32: states before pieces
    last_states,  # [B, D] float32: after the last token
    D: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    CHANNELS: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Runs through a span, of CHANNELS channels."""
    row, span, channel, at_state = place(tokens, D, SPAN, CHANNELS)
    inside = channel < D
    bias = tl.load(gate_bias + channel, mask=inside, other=0.0)
    state = tl.load(before + at_state, mask=inside, other=0.0)
    for start in range(0, SPAN, PIECE):
        first = span * SPAN + start
        at_piece = (row * tl.cdiv(tokens, PIECE) + first // PIECE) * D + channel
        tl.store(piece_states + at_piece, state, mask=inside & (first < tokens))
        ahead = ()
        for i in tl.static_range(PIECE):
            z = load(projected, row, first + i, tokens, 3 * D, channel, inside)
            value = load(projected, row, first + i, tokens, 3 * D, D + channel, inside)
            gate = load(projected, row, first + i, tokens, 3 * D, 2 * D + channel, inside)
            ahead = ahead + ((z, value, gate, kind_of(kinds, row, first + i, tokens, SEGMENTED)),)  # noqa: RUF005
        for i in tl.static_range(PIECE):
            z, value, gate, kind = ahead[i]
            keep, take, _ = rates(gate.to(tl.float32) + bias, kind)
            state = keep * state + take * value.to(tl.float32)
            opened, _ = sigmoids(z.to(tl.float32))
            to = out + (row * tokens + first + i) * D + channel
            tl.store(to, (opened * state).to(out.dtype.element_ty), mask=inside & (first + i < tokens))
    tl.store(last_states + row * D + channel, state, mask=inside & (span == tl.cdiv(tokens, SPAN) - 1))


@triton.jit
def place(tokens, D: tl.constexpr, SPAN: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's row, span and channels, and where those lie in [B, S, D]."""
    blocks: tl.constexpr = (D + CHANNELS - 1) // CHANNELS
    row = tl.program_id(1).to(tl.int64)
    span = tl.program_id(0) // blocks
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return row, span, channel, (row * tl.cdiv(tokens, SPAN) + span) * D + channel


@triton.jit
def kind_of(kinds, row, token, tokens, SEGMENTED: tl.constexpr):
    """0 goes on, 1 begins a document, 2 leaves the state as it is: padding, and what comes after the row."""
    if SEGMENTED:
        return tl.load(kinds + row * tokens + token, mask=token < tokens, other=2)
    return tl.where(token < tokens, 0, 2)


@triton.jit
def load(array, row, token, tokens, WIDTH: tl.constexpr, channel, inside):
    """Channels of a token of [B, T, WIDTH]; 0 after the row."""
    return tl.load(array + (row * tokens + token) * WIDTH + channel, mask=inside & (token < tokens), other=0.0)


@triton.jit
def rates(gate, kind):
    """What is kept of the state before a token, what is taken of its value, and their slope by the gate."""
    forget, take = sigmoids(gate)
    keep = tl.where(kind == 0, forget, tl.where(kind == 1, 0.0, 1.0))
    return keep, tl.where(kind == 2, 0.0, take), tl.where(kind == 2, 0.0, forget * take)


def spans_launch(shape: RnnShape, span: int) -> Launch:
    """`rnn_spans_forward`; the inputs are those of the kernel in their order."""
    states = (shape.batch, cdiv(shape.tokens, span), shape.width)
    return launch_of(rnn_spans_forward, shape, span, ((states, "float32"), (states, "float32")))


def forward_launch(shape: RnnShape, span: int) -> Launch:
    """`rnn_forward`; the inputs are those of the kernel in their order."""
    outputs = (
        ((shape.batch, shape.tokens, shape.width), shape.dtype),
        ((shape.batch, cdiv(shape.tokens, PIECE), shape.width), "float32"),
        ((shape.batch, shape.width), "float32"),
    )
    return launch_of(rnn_forward, shape, span, outputs)


def launch_of(kernel, shape: RnnShape, span: int, outputs: tuple[tuple[tuple[int, ...], str], ...]) -> Launch:
    """Of a kernel with a program for every row, span and block of channels."""
    return Launch(
        kernel=kernel,
        grid=(cdiv(shape.width, CHANNELS) * cdiv(shape.tokens, span), shape.batch),
        integers=(shape.tokens,),
        outputs=outputs,
        constants=(
            ("D", shape.width),
            ("SPAN", span),
            ("PIECE", PIECE),
            ("CHANNELS", CHANNELS),
            ("SEGMENTED", shape.segmented),
        ),
        num_warps=CHANNELS // 32,
        num_stages=1,
    )
