"""What queries read: out = phi(q) (S_0 + S_c) + tril(phi(q) phi(k)^T) v for a block of tokens that S_c enters."""

import triton
import triton.language as tl

from pallas_kernels.launch.triton import Launch
from pallas_kernels.linear_attention.triton_features import (
    half_features,
    load_initial,
    load_rows,
    load_state,
    store_rows,
    tokens_of,
)
from pallas_kernels.linear_attention.triton_states import document_before
from pallas_kernels.linear_attention.triton_tiling import Tiling


@triton.jit(do_not_specialize=["tokens"])
def linear_attention_outputs(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    states,  # [B, K, C, 2, P, P]: what enters each block
    initial,  # [1 or B, K or N, 2 H, H]; read only if INITIAL_HEADS
    segment_ids,  # [B, T] int32; read only if SEGMENTED
    tokens,  # T
    out,  # [B, T, N, H]
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr,
    HEADS: tl.constexpr,
    INITIAL_ROWS: tl.constexpr,
    INITIAL_HEADS: tl.constexpr,
):
    """One program takes one block and goes through the query heads of a key head, HEADS at once.

    The key head's features are made once.
    """
    SHARED: tl.constexpr = N // K
    PARTS: tl.constexpr = P // COLUMNS
    column = tl.program_id(0) % PARTS * COLUMNS
    k = tl.program_id(0) // PARTS % K
    block = tl.program_id(0) // (PARTS * K)
    row = tl.program_id(1).to(tl.int64)
    in_row, in_tile, first, seen, reads, _ = block_tokens(segment_ids, row, block, tokens, BLOCK, HEADS, SEGMENTED)
    raw = load_rows(key, first, in_row, k, 0, K, H, P).to(tl.float32)
    v = load_rows(value, first, in_row, k, column, K, H, COLUMNS)
    key_plus = half_features(raw, H, P, SOFTMAX).to(v.dtype)
    key_minus = half_features(-raw, H, P, SOFTMAX).to(v.dtype)
    state = states + ((row * K + k) * tl.cdiv(tokens, BLOCK) + block) * (2 * P * P)
    state_plus = load_state(state, 0, column, P, COLUMNS)
    state_minus = load_state(state, 1, column, P, COLUMNS)
    for n in range(k * SHARED, (k + 1) * SHARED, HEADS):
        q = load_rows(query, first, in_tile, n, 0, N, H, P, HEADS).to(tl.float32)
        plus = half_features(q, H, P, SOFTMAX).to(v.dtype)
        minus = half_features(-q, H, P, SOFTMAX).to(v.dtype)
        scores = tl.dot(plus, tl.trans(key_plus), input_precision=PRECISION)
        scores = tl.dot(minus, tl.trans(key_minus), scores, input_precision=PRECISION)
        scores = tl.where(seen, scores, 0.0).to(v.dtype)
        acc = tl.dot(plus, state_plus, input_precision=PRECISION)
        acc = tl.dot(minus, state_minus, acc, input_precision=PRECISION)
        if SEGMENTED:
            acc = tl.where(reads[:, None], acc, 0.0)
        if INITIAL_HEADS:
            of_head = initial_of(initial, row, n, k, H, K, INITIAL_ROWS, INITIAL_HEADS)
            right = load_initial(of_head, 0, column, H, P, COLUMNS)
            acc = tl.dot(plus, right.to(v.dtype), acc, input_precision=PRECISION)
            right = load_initial(of_head, 1, column, H, P, COLUMNS)
            acc = tl.dot(minus, right.to(v.dtype), acc, input_precision=PRECISION)
        acc = tl.dot(scores, v, acc, input_precision=PRECISION)
        store_rows(out, first, in_tile, n, column, acc, N, H, COLUMNS, HEADS)


@triton.jit
def block_tokens(segment_ids, row, block, tokens, BLOCK: tl.constexpr, HEADS: tl.constexpr, SEGMENTED: tl.constexpr):
    """Which keys of a block, and which rows of its queries, are in the row of the batch; and the block's place there.

    Then which queries see which keys, which read S_c, and which keys G_c is of.
    """
    token = tokens_of(block, BLOCK)
    of_tile = tokens_of(block, BLOCK, HEADS)
    in_row = token < tokens
    in_tile = of_tile < tokens
    seen = of_tile[:, None] >= token[None, :]
    reads = in_tile
    is_read = in_row
    if SEGMENTED:
        document = tl.load(segment_ids + row * tokens + token, mask=in_row, other=0)
        reader = tl.load(segment_ids + row * tokens + of_tile, mask=in_tile, other=0)
        seen = seen & (reader[:, None] == document[None, :])
        reads = in_tile & (reader == document_before(segment_ids, row, block, tokens, BLOCK))
        is_read = in_row & (document == document_before(segment_ids, row, block + 1, tokens, BLOCK))
    return in_row, in_tile, row * tokens + block * BLOCK, seen, reads, is_read


@triton.jit
def initial_of(
    initial, row, n, k, H: tl.constexpr, K: tl.constexpr, INITIAL_ROWS: tl.constexpr, INITIAL_HEADS: tl.constexpr
):
    """The initial state of a query head."""
    place = row * INITIAL_HEADS if INITIAL_ROWS > 1 else 0
    return initial + (place + (k if INITIAL_HEADS == K else n)) * (2 * H * H)


def outputs_launch(tiling: Tiling) -> Launch:
    """`linear_attention_outputs`; the inputs are those of the kernel in their order."""
    return Launch(
        kernel=linear_attention_outputs,
        grid=(tiling.blocks * tiling.shape.key_heads * (tiling.padded // tiling.columns), tiling.shape.batch),
        integers=(tiling.shape.tokens,),
        outputs=(
            (
                (tiling.shape.batch, tiling.shape.tokens, tiling.shape.num_heads, tiling.shape.head_dim),
                tiling.shape.dtype,
            ),
        ),
        constants=(*tiling.constants(), ("HEADS", tiling.stacked), *tiling.initial_constants()),
        num_warps=8 if tiling.padded > 64 else 4,
        num_stages=1 if tiling.shape.initial_heads else tiling.stages,
    )
