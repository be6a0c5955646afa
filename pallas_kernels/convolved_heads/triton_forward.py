"""Spans of tokens, from their first one on."""

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
def convolved_heads_forward(
    projected,  # [B, T, C]: q, k, v
    taps,  # [TAPS, C] float32
    positions,  # [B, T] int32: places in documents; read only if SEGMENTED
    tokens,  # T
    query,  # [B, T, KEY_WIDTH]
    key,  # [B, T, KEY_WIDTH]
    value,  # [B, T, VALUE_WIDTH]
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
    """One program takes a span of a row, and KEY_HEADS heads of queries or of keys, or VALUE_COLUMNS channels."""
    width: tl.constexpr = 2 * KEY_WIDTH + VALUE_WIDTH
    of_keys: tl.constexpr = (KEY_WIDTH + KEY_HEADS * KEY_DIM - 1) // (KEY_HEADS * KEY_DIM)
    blocks: tl.constexpr = 2 * of_keys + (VALUE_WIDTH + VALUE_COLUMNS - 1) // VALUE_COLUMNS
    row = tl.program_id(1).to(tl.int64)
    start = tl.program_id(0) // blocks * SPAN
    block = tl.program_id(0) % blocks
    if block < of_keys:
        at_query = channels_of(block, KEY_WIDTH, KEY_DIM, KEY_HEADS, KEY_COLUMNS)
        _span(
            projected, taps, positions, query, row, start, tokens, at_query, 0, width, KEY_WIDTH, TAPS, SPAN, PIECE,
            STAGES, SEGMENTED, EPSILON, KEY_DIM**-0.5,
        )  # fmt: skip
    elif block < 2 * of_keys:
        at_key = channels_of(block - of_keys, KEY_WIDTH, KEY_DIM, KEY_HEADS, KEY_COLUMNS)
        _span(
            projected, taps, positions, key, row, start, tokens, at_key, KEY_WIDTH, width, KEY_WIDTH, TAPS, SPAN, PIECE,
            STAGES, SEGMENTED, EPSILON, 1.0,
        )  # fmt: skip
    else:
        at_value = channels_of(block - 2 * of_keys, VALUE_WIDTH, VALUE_COLUMNS, 1, VALUE_COLUMNS)
        _span(
            projected, taps, positions, value, row, start, tokens, at_value, 2 * KEY_WIDTH, width, VALUE_WIDTH, TAPS,
            SPAN, PIECE, STAGES, SEGMENTED, EPSILON, 0.0,
        )  # fmt: skip


@triton.jit
def _span(
    projected, taps, positions, out, row, start, tokens, at,
    FIRST: tl.constexpr, C: tl.constexpr, WIDTH: tl.constexpr, TAPS: tl.constexpr, SPAN: tl.constexpr,
    PIECE: tl.constexpr, STAGES: tl.constexpr, SEGMENTED: tl.constexpr, EPSILON: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """Of the channels `at`, from FIRST on in `projected`; heads get this LENGTH if it is above 0."""
    channel, inside = at
    dtype = out.dtype.element_ty
    weights = load_taps(taps + FIRST, C, TAPS, channel, inside)
    earlier = ()
    for i in tl.static_range(1, TAPS):
        latest = load(projected + FIRST, row, start - i, tokens, C, channel, inside)
        earlier = earlier + (latest.to(tl.float32),)  # noqa: RUF005
    for first in tl.range(start, start + SPAN, PIECE, num_stages=STAGES):
        ahead = ()
        for i in tl.static_range(PIECE):
            loaded = load(projected + FIRST, row, first + i, tokens, C, channel, inside)
            ahead = ahead + ((loaded, position_of(positions, row, first + i, tokens, SEGMENTED)),)  # noqa: RUF005
        for i in tl.static_range(PIECE):
            x = ahead[i][0].to(tl.float32)
            y, _ = silus(convolve(x, earlier, weights, ahead[i][1], TAPS, SEGMENTED))
            if LENGTH > 0:
                y = y * (LENGTH * tl.rsqrt(tl.sum(y * y, 1, keep_dims=True) + EPSILON))
            to = out + (row * tokens + first + i) * WIDTH + channel
            tl.store(to, y.to(dtype), mask=inside & (first + i < tokens))
            earlier = ((x,) + earlier)[: TAPS - 1]  # noqa: RUF005


def forward_launch(tiling: Tiling) -> Launch:
    """`convolved_heads_forward`; the inputs are those of the kernel in their order."""
    shape, blocks = tiling.shape, tiling.forward_blocks
    rows = shape.batch, shape.tokens
    widths = shape.key_width, shape.key_width, shape.value_width
    return Launch(
        kernel=convolved_heads_forward,
        grid=tiling.grid(blocks),
        integers=(shape.tokens,),
        outputs=tuple(((*rows, width), shape.dtype) for width in widths),
        constants=tiling.constants(blocks),
        num_warps=blocks.warps,
        num_stages=1,
    )
