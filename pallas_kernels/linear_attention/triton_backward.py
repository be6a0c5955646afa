"""Gradients of linear attention inside blocks, and what comes from the sums that enter a block from either side.

With S_c the forward sum that enters a block and G_c the reverse one, the sum of phi(q)^T d_out after the block,

    d_v = phi(k) G_c + tril(phi(q) phi(k)^T)^T d_out           d_scores = tril(d_out v^T)
    d_phi(k) = v G_c^T + d_scores^T phi(q)                     d_phi(q) = d_out (S_0 + S_c)^T + d_scores phi(k).
"""

import triton
import triton.language as tl

from pallas_kernels.launch.triton import Launch
from pallas_kernels.linear_attention.triton_features import (
    half_features,
    load_initial,
    load_rows,
    load_state,
    pull_back,
    store_rows,
)
from pallas_kernels.linear_attention.triton_outputs import block_tokens, initial_of
from pallas_kernels.linear_attention.triton_tiling import Tiling


@triton.jit(do_not_specialize=["tokens"])
def linear_attention_keys(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    d_states,  # [B, K, C, 2, P, P]: the reverse sum that enters each block
    segment_ids,  # [B, T] int32; read only if SEGMENTED
    tokens,  # T
    d_key,  # [B, T, K, H]
    d_value,  # [B, T, K, H]
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program computes COLUMNS channels of d_value of a block, and the first one of a block its d_key.

    That is by the gradients of both halves of its features. Scores are made transposed, [keys, queries].
    """
    SHARED: tl.constexpr = N // K
    PARTS: tl.constexpr = P // COLUMNS
    part = tl.program_id(0) % PARTS
    column = part * COLUMNS
    k = tl.program_id(0) // PARTS % K
    block = tl.program_id(0) // (PARTS * K)
    row = tl.program_id(1).to(tl.int64)
    in_row, _, first, seen, _, is_read = block_tokens(segment_ids, row, block, tokens, BLOCK, 1, SEGMENTED)
    seen = tl.trans(seen)
    raw = load_rows(key, first, in_row, k, 0, K, H, P).to(tl.float32)
    v = load_rows(value, first, in_row, k, 0, K, H, COLUMNS)
    key_plus = half_features(raw, H, P, SOFTMAX).to(v.dtype)
    key_minus = half_features(-raw, H, P, SOFTMAX).to(v.dtype)
    state = d_states + ((row * K + k) * tl.cdiv(tokens, BLOCK) + block) * (2 * P * P)
    state_plus = load_state(state, 0, column, P, COLUMNS)
    state_minus = load_state(state, 1, column, P, COLUMNS)
    d_v = tl.dot(key_plus, state_plus, input_precision=PRECISION)
    d_v = tl.dot(key_minus, state_minus, d_v, input_precision=PRECISION)
    d_plus = tl.zeros([BLOCK, P], tl.float32)
    d_minus = tl.zeros([BLOCK, P], tl.float32)
    if part == 0:
        d_plus = _dot_transposed(v, state_plus, d_plus, PRECISION)
        d_minus = _dot_transposed(v, state_minus, d_minus, PRECISION)
        for more in tl.static_range(COLUMNS, P, COLUMNS):
            more_v = load_rows(value, first, in_row, k, more, K, H, COLUMNS)
            d_plus = _dot_transposed(more_v, load_state(state, 0, more, P, COLUMNS), d_plus, PRECISION)
            d_minus = _dot_transposed(more_v, load_state(state, 1, more, P, COLUMNS), d_minus, PRECISION)
    if SEGMENTED:
        d_v = tl.where(is_read[:, None], d_v, 0.0)
        d_plus = tl.where(is_read[:, None], d_plus, 0.0)
        d_minus = tl.where(is_read[:, None], d_minus, 0.0)
    for n in range(k * SHARED, (k + 1) * SHARED):
        q = load_rows(query, first, in_row, n, 0, N, H, P).to(tl.float32)
        do = load_rows(d_out, first, in_row, n, column, N, H, COLUMNS)
        plus = half_features(q, H, P, SOFTMAX).to(v.dtype)
        minus = half_features(-q, H, P, SOFTMAX).to(v.dtype)
        scores = tl.dot(key_plus, tl.trans(plus), input_precision=PRECISION)
        scores = _dot_transposed(key_minus, minus, scores, PRECISION)
        scores = tl.where(seen, scores, 0.0).to(v.dtype)
        d_v = tl.dot(scores, do, d_v, input_precision=PRECISION)
        if part == 0:
            d_scores = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            for more in tl.static_range(COLUMNS, P, COLUMNS):
                more_v = load_rows(value, first, in_row, k, more, K, H, COLUMNS)
                more_do = load_rows(d_out, first, in_row, n, more, N, H, COLUMNS)
                d_scores = _dot_transposed(more_v, more_do, d_scores, PRECISION)
            d_scores = tl.where(seen, d_scores, 0.0).to(v.dtype)
            d_plus = tl.dot(d_scores, plus, d_plus, input_precision=PRECISION)
            d_minus = tl.dot(d_scores, minus, d_minus, input_precision=PRECISION)
    store_rows(d_value, first, in_row, k, column, d_v, K, H, COLUMNS)
    if part == 0:
        raw = load_rows(key, first, in_row, k, 0, K, H, P).to(tl.float32)
        d_raw = pull_back(half_features(raw, H, P, SOFTMAX), d_plus, SOFTMAX)
        d_raw -= pull_back(half_features(-raw, H, P, SOFTMAX), d_minus, SOFTMAX)
        store_rows(d_key, first, in_row, k, 0, d_raw, K, H, P)


@triton.jit(do_not_specialize=["tokens"])
def linear_attention_queries(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    states,  # [B, K, C, 2, P, P]: the forward sum that enters each block
    initial,  # [1 or B, K or N, 2 H, H]; read only if INITIAL_HEADS
    segment_ids,  # [B, T] int32; read only if SEGMENTED
    tokens,  # T
    d_query,  # [B, T, N, H]
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr,
    INITIAL_ROWS: tl.constexpr,
    INITIAL_HEADS: tl.constexpr,
):
    """One program takes one block and goes through the query heads of a key head.

    It takes one half of the features at a time; the scores' gradient is made once a head.
    """
    SHARED: tl.constexpr = N // K
    k = tl.program_id(0) % K
    block = tl.program_id(0) // K
    row = tl.program_id(1).to(tl.int64)
    in_row, _, first, seen, reads, _ = block_tokens(segment_ids, row, block, tokens, BLOCK, 1, SEGMENTED)
    state = states + ((row * K + k) * tl.cdiv(tokens, BLOCK) + block) * (2 * P * P)
    raw = load_rows(key, first, in_row, k, 0, K, H, P).to(tl.float32)
    key_plus = half_features(raw, H, P, SOFTMAX).to(states.dtype.element_ty)
    key_minus = half_features(-raw, H, P, SOFTMAX).to(states.dtype.element_ty)
    # What all heads share is loaded once if it is one tile; here the first COLUMNS channels of it.
    v = load_rows(value, first, in_row, k, 0, K, H, COLUMNS)
    state_plus = load_state(state, 0, 0, P, COLUMNS)
    state_minus = load_state(state, 1, 0, P, COLUMNS)
    for n in range(k * SHARED, (k + 1) * SHARED):
        do = load_rows(d_out, first, in_row, n, 0, N, H, COLUMNS)
        d_scores = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        for column in tl.static_range(COLUMNS, P, COLUMNS):
            more_v = load_rows(value, first, in_row, k, column, K, H, COLUMNS)
            more_do = load_rows(d_out, first, in_row, n, column, N, H, COLUMNS)
            d_scores = _dot_transposed(more_do, more_v, d_scores, PRECISION)
        d_scores = tl.where(seen, d_scores, 0.0).to(states.dtype.element_ty)
        q = load_rows(query, first, in_row, n, 0, N, H, P).to(tl.float32)
        of_head = initial
        if INITIAL_HEADS:
            of_head = initial_of(initial, row, n, k, H, K, INITIAL_ROWS, INITIAL_HEADS)
        d_f = tl.dot(d_scores, key_plus, input_precision=PRECISION)
        d_f = _through_states(
            d_f, do, state_plus, d_out, state, of_head, 0, first, in_row, reads, n,
            N, H, P, COLUMNS, SEGMENTED, PRECISION, INITIAL_HEADS,
        )  # fmt: skip
        d_raw = pull_back(half_features(q, H, P, SOFTMAX), d_f, SOFTMAX)
        d_f = tl.dot(d_scores, key_minus, input_precision=PRECISION)
        d_f = _through_states(
            d_f, do, state_minus, d_out, state, of_head, 1, first, in_row, reads, n,
            N, H, P, COLUMNS, SEGMENTED, PRECISION, INITIAL_HEADS,
        )  # fmt: skip
        d_raw -= pull_back(half_features(-q, H, P, SOFTMAX), d_f, SOFTMAX)
        store_rows(d_query, first, in_row, n, 0, d_raw, N, H, P)


@triton.jit
def _through_states(
    d_f, do, of_half, d_out, state, initial, half, first, in_row, reads, n,
    N: tl.constexpr, H: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, INITIAL_HEADS: tl.constexpr,
):  # fmt: skip
    """Adds d_out (S_0 + S_c)^T for one half of the features; `do` and `of_half` are their first COLUMNS channels."""
    for column in tl.static_range(0, P, COLUMNS):
        if column > 0:
            do = load_rows(d_out, first, in_row, n, column, N, H, COLUMNS)
            of_half = load_state(state, half, column, P, COLUMNS)
        if INITIAL_HEADS:
            right = load_initial(initial, half, column, H, P, COLUMNS)
            d_f = _dot_transposed(do, right.to(do.dtype), d_f, PRECISION)
        if SEGMENTED:
            do = tl.where(reads[:, None], do, 0.0).to(do.dtype)
        d_f = _dot_transposed(do, of_half, d_f, PRECISION)
    return d_f


@triton.jit
def _dot_transposed(left, right, acc, PRECISION: tl.constexpr):
    """acc + left right^T."""
    return tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)


def keys_launch(tiling: Tiling) -> Launch:
    """`linear_attention_keys`; the inputs are those of the kernel in their order, as they are below."""
    return _launch(
        tiling, linear_attention_keys, 2, tiling.shape.key_heads, tiling.padded // tiling.columns, tiling.stages
    )


def queries_launch(tiling: Tiling) -> Launch:
    """`linear_attention_queries`."""
    return _launch(tiling, linear_attention_queries, 1, tiling.shape.num_heads, 1, 1, tiling.initial_constants())


def _launch(tiling: Tiling, kernel, count: int, heads: int, parts: int, stages: int, more=()) -> Launch:
    return Launch(
        kernel=kernel,
        grid=(tiling.blocks * tiling.shape.key_heads * parts, tiling.shape.batch),
        integers=(tiling.shape.tokens,),
        outputs=(((tiling.shape.batch, tiling.shape.tokens, heads, tiling.shape.head_dim), tiling.shape.dtype),)
        * count,
        constants=(*tiling.constants(), *more),
        num_warps=8 if tiling.padded > 64 else 4,
        num_stages=stages,
    )
