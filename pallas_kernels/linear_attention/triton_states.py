"""States of linear attention: running sums over blocks of phi(x)^T y, in either direction.

A boundary b lies before block b, and its document is that of the token before it. Forward, the sum at a boundary is
over the earlier tokens of its document; in reverse, over its document's later tokens. A block's array entry holds the
sum that enters the block from the side where the direction starts.

Where rows and heads are enough to fill a card, `linear_attention_states` goes through whole rows. Elsewhere segments of
blocks are summed up in parallel (`linear_attention_totals`), then the totals one after the other
(`linear_attention_scan`), then the blocks of every segment (`linear_attention_states`): the products are taken twice,
which costs less than to write and read float32 sums of every block.
"""

import triton
import triton.language as tl

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch
from pallas_kernels.linear_attention.triton_features import half_features, load_rows, tokens_of
from pallas_kernels.linear_attention.triton_tiling import Tiling

_SCAN_ELEMENTS = 512


@triton.jit(do_not_specialize=["tokens", "span"])
def linear_attention_totals(
    x,  # [B, T, N, H], whose features are taken
    y,  # [B, T, N, H]
    segment_ids,  # [B, T] int32; read only if SEGMENTED
    tokens,  # T
    span,  # blocks of a segment
    totals,  # [B, K, segments, 2, P, P] float32
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
):
    """One program sums up one half of the features and COLUMNS channels of y over a segment, heads of a group too."""
    segment, k, half, column = _place(K, P, COLUMNS)
    row = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(tokens, BLOCK)
    first = segment * span
    last = tl.minimum(first + span, blocks) - 1
    state = tl.zeros([P, COLUMNS], tl.float32)
    STEPS: tl.constexpr = N // K
    for i in range((last - first + 1) * STEPS):
        block = last - i // STEPS if REVERSE else first + i // STEPS
        state = _add_head(
            state, block, i % STEPS, x, y, segment_ids, row, k, half, column, tokens,
            N, K, H, P, BLOCK, COLUMNS, SOFTMAX, SEGMENTED, PRECISION, REVERSE,
        )  # fmt: skip
    at = (row * K + k) * tl.cdiv(blocks, span) + segment
    tl.store(totals + at * (2 * P * P) + _matrix(half, column, P, COLUMNS), state)


@triton.jit(do_not_specialize=["tokens", "span"])
def linear_attention_scan(
    totals,  # [B, K, segments, 2, P, P] float32
    entering,  # [B, K, 2 H, H] float32: what comes before all tokens in this direction; read only if REVERSE
    segment_ids,  # [B, T] int32; read only if SEGMENTED
    tokens,  # T
    span,
    starts,  # [B, K, segments, 2, P, P] float32: the sum that enters each segment
    final,  # [B, K, 2 H, H] float32: the sum that leaves the last one
    K: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENTED: tl.constexpr,
    REVERSE: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    """One program goes through the segments with ELEMENTS elements of a key head's state."""
    PARTS: tl.constexpr = 2 * P * P // ELEMENTS
    k = tl.program_id(0) // PARTS
    row = tl.program_id(1).to(tl.int64)
    element = (tl.program_id(0) % PARTS) * ELEMENTS + tl.arange(0, ELEMENTS)
    feature = element // P % P
    channel = element % P
    real = (feature < H) & (channel < H)
    at_real = (row * K + k) * (2 * H * H) + (element // (P * P) * H + feature) * H + channel
    segments = tl.cdiv(tl.cdiv(tokens, BLOCK), span)
    at = (row * K + k) * segments * (2 * P * P) + element
    state = tl.zeros([ELEMENTS], tl.float32)
    if REVERSE:
        state = tl.load(entering + at_real, mask=real, other=0.0)
    for i in range(segments):
        segment = segments - 1 - i if REVERSE else i
        tl.store(starts + at + segment * (2 * P * P), state)
        if SEGMENTED:
            before = document_before(segment_ids, row, segment * span, tokens, BLOCK)
            after = document_before(segment_ids, row, (segment + 1) * span, tokens, BLOCK)
            state = tl.where(before == after, state, 0.0)
        state += tl.load(totals + at + segment * (2 * P * P))
    tl.store(final + at_real, state, mask=real)


@triton.jit(do_not_specialize=["tokens", "span"])
def linear_attention_states(
    x,  # [B, T, N, H]
    y,  # [B, T, N, H]
    starts,  # [B, K, segments, 2, P, P] float32; if WHOLE what the scan takes as entering
    segment_ids,  # [B, T] int32; read only if SEGMENTED
    tokens,  # T
    span,
    states,  # [B, K, C, 2, P, P]: the sum that enters each block
    final,  # [B, K, 2 H, H] float32: the sum that leaves the last block; written only if WHOLE
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr,
    REVERSE: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """As `linear_attention_totals`, but from the sum that enters the segment, and every block's is stored.

    WHOLE: the one segment is the row, whose sum is the final state.
    """
    segment, k, half, column = _place(K, P, COLUMNS)
    row = tl.program_id(1).to(tl.int64)
    blocks = tl.cdiv(tokens, BLOCK)
    first = segment * span
    last = tl.minimum(first + span, blocks) - 1
    matrix = _matrix(half, column, P, COLUMNS)
    feature = tl.arange(0, P)[:, None]
    channel = column + tl.arange(0, COLUMNS)[None, :]
    real = (feature < H) & (channel < H)
    at_real = (row * K + k) * (2 * H * H) + (half * H + feature) * H + channel
    state = tl.zeros([P, COLUMNS], tl.float32)
    if not WHOLE:
        state = tl.load(starts + ((row * K + k) * tl.cdiv(blocks, span) + segment) * (2 * P * P) + matrix)
    elif REVERSE:
        state = tl.load(starts + at_real, mask=real, other=0.0)
    STEPS: tl.constexpr = N // K
    for i in range((last - first + 1) * STEPS):
        block = last - i // STEPS if REVERSE else first + i // STEPS
        if i % STEPS == 0:
            at = ((row * K + k) * blocks + block) * (2 * P * P)
            tl.store(states + at + matrix, state.to(states.dtype.element_ty))
        state = _add_head(
            state, block, i % STEPS, x, y, segment_ids, row, k, half, column, tokens,
            N, K, H, P, BLOCK, COLUMNS, SOFTMAX, SEGMENTED, PRECISION, REVERSE,
        )  # fmt: skip
    if WHOLE:
        tl.store(final + at_real, state, mask=real)


@triton.jit
def _place(K: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr):
    """Segment, key head, half of the features and first column of a program."""
    PARTS: tl.constexpr = P // COLUMNS
    pid = tl.program_id(0)
    return pid // (PARTS * 2 * K), pid // (PARTS * 2) % K, pid // PARTS % 2, pid % PARTS * COLUMNS


@triton.jit
def _matrix(half, column, P: tl.constexpr, COLUMNS: tl.constexpr):
    return (half * P + tl.arange(0, P))[:, None] * P + column + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _add_head(
    state, block, step, x, y, segment_ids, row, k, half, column, tokens,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Adds a head of a block; after the last step it is the sum at the boundary on the block's other side."""
    token = tokens_of(block, BLOCK)
    rows = token < tokens
    if SEGMENTED:
        before = document_before(segment_ids, row, block, tokens, BLOCK)
        after = document_before(segment_ids, row, block + 1, tokens, BLOCK)
        document = tl.load(segment_ids + row * tokens + token, mask=rows, other=0)
        rows = rows & (document == (before if REVERSE else after))
        state = tl.where((before == after) | (step > 0), state, 0.0)
    at_block = row * tokens + block * BLOCK
    n = k * (N // K) + step
    raw = load_rows(x, at_block, rows, n, 0, N, H, P).to(tl.float32)
    f = half_features(raw * (1.0 - 2.0 * half), H, P, SOFTMAX)
    right = load_rows(y, at_block, rows, n, column, N, H, COLUMNS)
    return tl.dot(tl.trans(f.to(right.dtype)), right, state, input_precision=PRECISION)


@triton.jit
def document_before(segment_ids, row, block, tokens, BLOCK: tl.constexpr):
    """The document of the boundary before a block."""
    return tl.load(segment_ids + row * tokens + tl.maximum(tl.minimum(block * BLOCK, tokens) - 1, 0))


def totals_launch(tiling: Tiling, heads: int, reverse: bool) -> Launch:
    """`linear_attention_totals` for x and y of `heads` heads; the inputs are those of the kernel in their order."""
    outputs = (
        ((tiling.shape.batch, tiling.shape.key_heads, tiling.segments, 2, tiling.padded, tiling.padded), "float32"),
    )
    return _sums_launch(tiling, heads, reverse, linear_attention_totals, outputs)


def states_launch(tiling: Tiling, heads: int, reverse: bool) -> Launch:
    """`linear_attention_states` for x and y of `heads` heads."""
    whole = tiling.segments == 1
    outputs = (
        (
            (tiling.shape.batch, tiling.shape.key_heads, tiling.blocks, 2, tiling.padded, tiling.padded),
            tiling.shape.dtype,
        ),
        (
            (tiling.shape.batch, tiling.shape.key_heads, 2 * tiling.shape.head_dim, tiling.shape.head_dim)
            if whole
            else (1, 1, 1, 1),
            "float32",
        ),
    )
    return _sums_launch(tiling, heads, reverse, linear_attention_states, outputs, (("WHOLE", whole),))


def _sums_launch(tiling: Tiling, heads: int, reverse: bool, kernel, outputs, more=()) -> Launch:
    more = (("N", heads), ("REVERSE", reverse), *more)
    return Launch(
        kernel=kernel,
        grid=(tiling.segments * tiling.shape.key_heads * 2 * (tiling.padded // tiling.columns), tiling.shape.batch),
        integers=(tiling.shape.tokens, tiling.span),
        outputs=outputs,
        constants=tuple((dict(tiling.constants()) | dict(more)).items()),
        num_warps=8 if tiling.padded * tiling.columns >= 128 * 64 else 4,
        num_stages=2 if tiling.shape.dtype != "float32" else 1,
    )


def scan_launch(tiling: Tiling, reverse: bool) -> Launch:
    elements = min(_SCAN_ELEMENTS, 2 * tiling.padded**2)
    return Launch(
        kernel=linear_attention_scan,
        grid=(tiling.shape.key_heads * cdiv(2 * tiling.padded**2, elements), tiling.shape.batch),
        integers=(tiling.shape.tokens, tiling.span),
        outputs=(
            ((tiling.shape.batch, tiling.shape.key_heads, tiling.segments, 2, tiling.padded, tiling.padded), "float32"),
            ((tiling.shape.batch, tiling.shape.key_heads, 2 * tiling.shape.head_dim, tiling.shape.head_dim), "float32"),
        ),
        constants=(
            ("K", tiling.shape.key_heads),
            ("H", tiling.shape.head_dim),
            ("P", tiling.padded),
            ("BLOCK", tiling.block),
            ("SEGMENTED", tiling.shape.segmented),
            ("REVERSE", reverse),
            ("ELEMENTS", elements),
        ),
        num_warps=4,
        num_stages=3,
    )
