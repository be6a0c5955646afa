"""Gradients of spans of tokens, from their last one back.

With d the gradient of a result y, c the convolved token, s = silu(c) and, of a head of length l, r = 1 / sqrt(s s + e)
and y = l r s, of which values have the second line alone:

    ds_t = l r (d_t - r^2 (s_t d_t) s_t),
    dc_t = silu'(c_t) ds_t,    dx_t = sum_i taps_{K-1-i} dc_{t+i},    dtaps_{K-1-i} = sum_t dc_{t+i} x_t.
"""

import triton
import triton.language as tl

from pallas_kernels.convolved_heads.triton_spans import (
    channels_of,
    convolve,
    load,
    load_taps,
    position_of,
    silus,
)
from pallas_kernels.convolved_heads.triton_tiling import Tiling
from pallas_kernels.launch.triton import Launch


@triton.jit(do_not_specialize=["tokens"])
def convolved_heads_backward(
    projected,  # [B, T, C]: q, k, v
    taps,  # [TAPS, C] float32
    positions,  # [B, T] int32, as in the forward pass
    d_query,  # [B, T, KEY_WIDTH]
    d_key,  # [B, T, KEY_WIDTH]
    d_value,  # [B, T, VALUE_WIDTH]
    tokens,  # T
    d_projected,  # [B, T, C]
    d_taps,  # [B, S, TAPS, C] float32: sums of spans
    KEY_WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    KEY_COLUMNS: tl.constexpr,
    VALUE_COLUMNS: tl.constexpr,
    TAPS: tl.constexpr,
    SPAN: tl.constexpr,
    PIECE: tl.constexpr,
    STAGES: tl.constexpr,
    SEGMENTED: tl.constexpr,
    EPSILON: tl.constexpr,
):
    """Programs are those of the forward pass, but of other sizes."""
    width: tl.constexpr = 2 * KEY_WIDTH + VALUE_WIDTH
    of_keys: tl.constexpr = (KEY_WIDTH + KEY_HEADS * KEY_DIM - 1) // (KEY_HEADS * KEY_DIM)
    blocks: tl.constexpr = 2 * of_keys + (VALUE_WIDTH + VALUE_COLUMNS - 1) // VALUE_COLUMNS
    row = tl.program_id(1).to(tl.int64)
    span = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    d_taps += (row * tl.cdiv(tokens, SPAN) + span) * (TAPS * width)
    if block < of_keys:
        at_query = channels_of(block, KEY_WIDTH, KEY_DIM, KEY_HEADS, KEY_COLUMNS)
        _span(
            projected, taps, positions, d_query, d_projected, d_taps, row, span * SPAN, tokens, at_query, 0, width,
            KEY_WIDTH, TAPS, SPAN, PIECE, STAGES, SEGMENTED, EPSILON, KEY_DIM**-0.5,
        )  # fmt: skip
    elif block < 2 * of_keys:
        at_key = channels_of(block - of_keys, KEY_WIDTH, KEY_DIM, KEY_HEADS, KEY_COLUMNS)
        _span(
            projected, taps, positions, d_key, d_projected, d_taps, row, span * SPAN, tokens, at_key, KEY_WIDTH, width,
            KEY_WIDTH, TAPS, SPAN, PIECE, STAGES, SEGMENTED, EPSILON, 1.0,
        )  # fmt: skip
    else:
        at_value = channels_of(block - 2 * of_keys, VALUE_WIDTH, VALUE_COLUMNS, 1, VALUE_COLUMNS)
        _span(
            projected, taps, positions, d_value, d_projected, d_taps, row, span * SPAN, tokens, at_value, 2 * KEY_WIDTH,
            width, VALUE_WIDTH, TAPS, SPAN, PIECE, STAGES, SEGMENTED, EPSILON, 0.0,
        )  # fmt: skip


@triton.jit
def _span(
    projected, taps, positions, d_out, d_projected, d_taps, row, start, tokens, at,
    FIRST: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, SPAN: tl.constexpr,
    PIECE: tl.constexpr, STAGES: tl.constexpr, SEGMENTED: tl.constexpr, EPSILON: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Of the channels `at`, from FIRST on in `projected`; heads have this LENGTH if it is above 0."""
    channel, inside = at
    dtype = d_projected.dtype.element_ty
    projected += FIRST
    weights = load_taps(taps + FIRST, C, TAPS, channel, inside)
    sums, seen, later = (), (), ()  # x of a token and those before it; dc of those after it, the next one first
    for i in tl.static_range(TAPS):
        sums = sums + (tl.zeros_like(weights[i]),)  # noqa: RUF005
    for i in tl.static_range(TAPS - 1):
        latest = load(projected, row, start + SPAN + TAPS - 2 - i, tokens, C, channel, inside)
        seen = seen + (latest.to(tl.float32),)  # noqa: RUF005
        later = later + (tl.zeros_like(weights[i]),)  # noqa: RUF005
    for i in tl.static_range(TAPS - 1):  # tokens after the span, which read some of it
        after = start + SPAN + TAPS - 2 - i
        before = load(projected, row, after - TAPS + 1, tokens, C, channel, inside).to(tl.float32)
        d_after = load(d_out, row, after, tokens, WIDTH, channel, inside).to(tl.float32)
        place = position_of(positions, row, after, tokens, SEGMENTED)
        seen = seen + (before,)  # noqa: RUF005
        later = (_d_convolved(seen, d_after, place, weights, TAPS, SEGMENTED, EPSILON, LENGTH),) + later  # noqa: RUF005
        later = _of_document(later[: TAPS - 1], place, TAPS, SEGMENTED)
        seen = seen[1:]
    for back in tl.range(0, SPAN, PIECE, num_stages=STAGES):
        last = start + SPAN - 1 - back
        ahead = ()
        for i in tl.static_range(PIECE):
            x = load(projected, row, last - i - TAPS + 1, tokens, C, channel, inside)
            d = load(d_out, row, last - i, tokens, WIDTH, channel, inside)
            ahead = ahead + ((x, d, position_of(positions, row, last - i, tokens, SEGMENTED)),)  # noqa: RUF005
        for i in tl.static_range(PIECE):
            d_y, position = ahead[i][1].to(tl.float32), ahead[i][2]
            seen = seen + (ahead[i][0].to(tl.float32),)  # noqa: RUF005
            later = (_d_convolved(seen, d_y, position, weights, TAPS, SEGMENTED, EPSILON, LENGTH),) + later  # noqa: RUF005
            d_x = later[0] * weights[0]
            for j in tl.static_range(1, TAPS):
                d_x += later[j] * weights[j]
            sums = _added(sums, later, seen[0], TAPS)
            to = d_projected + (row * tokens + last - i) * C + FIRST + channel
            tl.store(to, d_x.to(dtype), mask=inside & (last - i < tokens))
            later = _of_document(later[: TAPS - 1], position, TAPS, SEGMENTED)
            seen = seen[1:]
    for i in tl.static_range(TAPS):
        tl.store(d_taps + (TAPS - 1 - i) * C + FIRST + channel, sums[i], mask=inside)


@triton.jit
def _d_convolved(
    seen,
    d,
    position,
    weights,
    TAPS: tl.constexpr,
    SEGMENTED: tl.constexpr,
    EPSILON: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """The gradient of a token's convolution from that of its result."""
    y, slope = silus(convolve(seen[0], seen[1:], weights, position, TAPS, SEGMENTED))
    if LENGTH > 0:
        inverse = tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) + EPSILON)
        along = tl.sum(y * d, 1, keep_dims=True)
        d = (LENGTH * inverse) * d - (LENGTH * inverse * inverse * inverse * along) * y
    return d * slope


@triton.jit
def _added(sums, later, x, TAPS: tl.constexpr):
    """Sums of products of a token and the gradients of those that read it."""
    found = ()
    for i in tl.static_range(TAPS):
        found = found + (sums[i] + later[i] * x,)  # noqa: RUF005
    return found


@triton.jit
def _of_document(later, position, TAPS: tl.constexpr, SEGMENTED: tl.constexpr):
    """What a token and those after it say of those before it: nothing where it begins a document."""
    if SEGMENTED:
        found = ()
        for i in tl.static_range(TAPS - 1):
            found = found + (tl.where(position > 0, later[i], 0.0),)  # noqa: RUF005
        return found
    else:
        return later


def backward_launch(tiling: Tiling) -> Launch:
    """`convolved_heads_backward`; the inputs are those of the kernel in their order."""
    shape, blocks = tiling.shape, tiling.backward_blocks
    return Launch(
        kernel=convolved_heads_backward,
        grid=tiling.grid(blocks),
        integers=(shape.tokens,),
        outputs=(
            ((shape.batch, shape.tokens, shape.width), shape.dtype),
            ((shape.batch, tiling.spans(blocks), shape.taps, shape.width), "float32"),
        ),
        constants=tiling.constants(blocks),
        num_warps=blocks.warps,
        num_stages=1,
    )
