"""Gradients of linear attention inside blocks, and what comes from the sums that enter a block from either side.

With S_c the forward sum that enters a block and G_c the reverse one, the sum of phi(q)^T d_out after the block,

    d_v = phi(k) G_c + tril(phi(q) phi(k)^T)^T d_out           d_scores = tril(d_out v^T)
    d_phi(k) = v G_c^T + d_scores^T phi(q)                     d_phi(q) = d_out (S_0 + S_c)^T + d_scores phi(k).
"""

import triton
import triton.language as tl

from pallas_kernels.triton.call import Launch
from pallas_kernels.triton.linear_attention_features import (
    half_features,
    load_initial,
    load_rows,
    load_state,
    pull_back,
    store_rows,
)
from pallas_kernels.triton.linear_attention_outputs import initial_of
from pallas_kernels.triton.linear_attention_problem import LinearProblem
from pallas_kernels.triton.linear_attention_states import document_before


@triton.jit(do_not_specialize=["tokens"])
def linear_attention_values(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    d_states,  # [B, K, C, 2, P, P]: the reverse sum that enters each block
    documents,  # [B, T] int32; read only if SEGMENTED
    tokens,  # T
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
    """One program computes COLUMNS channels of d_value of a block."""
    SHARED: tl.constexpr = N // K
    PARTS: tl.constexpr = P // COLUMNS
    column = tl.program_id(0) % PARTS * COLUMNS
    k = tl.program_id(0) // PARTS % K
    block = tl.program_id(0) // (PARTS * K)
    row = tl.program_id(1).to(tl.int64)
    in_row, first, seen, _, is_read = _tokens(documents, row, block, tokens, BLOCK, SEGMENTED)
    seen = tl.trans(seen)  # [keys, queries]
    raw = load_rows(key, first, in_row, k, 0, K, H, P).to(tl.float32)
    state = d_states + ((row * K + k) * tl.cdiv(tokens, BLOCK) + block) * (2 * P * P)
    state_plus = load_state(state, 0, column, P, COLUMNS)
    state_minus = load_state(state, 1, column, P, COLUMNS)
    key_plus = half_features(raw, H, P, SOFTMAX).to(state_plus.dtype)
    key_minus = half_features(-raw, H, P, SOFTMAX).to(state_plus.dtype)
    acc = tl.dot(key_plus, state_plus, input_precision=PRECISION)
    acc = tl.dot(key_minus, state_minus, acc, input_precision=PRECISION)
    if SEGMENTED:
        acc = tl.where(is_read[:, None], acc, 0.0)
    for r in range(SHARED):
        n = k * SHARED + r
        raw = load_rows(query, first, in_row, n, 0, N, H, P).to(tl.float32)
        do = load_rows(d_out, first, in_row, n, column, N, H, COLUMNS)
        plus = half_features(raw, H, P, SOFTMAX).to(do.dtype)
        minus = half_features(-raw, H, P, SOFTMAX).to(do.dtype)
        scores = tl.dot(key_plus, tl.trans(plus), input_precision=PRECISION)
        scores = tl.dot(key_minus, tl.trans(minus), scores, input_precision=PRECISION)
        scores = tl.where(seen, scores, 0.0).to(do.dtype)
        acc = tl.dot(scores, do, acc, input_precision=PRECISION)
    store_rows(d_value, first, in_row, k, column, acc, K, H, COLUMNS)


@triton.jit(do_not_specialize=["tokens"])
def linear_attention_keys(
    query,  # [B, T, N, H]
    key,  # [B, T, K, H]
    value,  # [B, T, K, H]
    d_out,  # [B, T, N, H]
    d_states,  # [B, K, C, 2, P, P]
    documents,  # [B, T] int32; read only if SEGMENTED
    tokens,  # T
    d_key,  # [B, T, K, H]
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
    """One program computes d_key of a block: the gradients of both halves of its features, then through them."""
    SHARED: tl.constexpr = N // K
    k = tl.program_id(0) % K
    block = tl.program_id(0) // K
    row = tl.program_id(1).to(tl.int64)
    in_row, first, seen, _, is_read = _tokens(documents, row, block, tokens, BLOCK, SEGMENTED)
    seen = tl.trans(seen)  # [keys, queries]
    state = d_states + ((row * K + k) * tl.cdiv(tokens, BLOCK) + block) * (2 * P * P)
    d_plus = tl.zeros([BLOCK, P], tl.float32)
    d_minus = tl.zeros([BLOCK, P], tl.float32)
    for column in tl.static_range(0, P, COLUMNS):
        v = load_rows(value, first, is_read, k, column, K, H, COLUMNS)
        d_plus = _dot_transposed(v, load_state(state, 0, column, P, COLUMNS), d_plus, PRECISION)
        d_minus = _dot_transposed(v, load_state(state, 1, column, P, COLUMNS), d_minus, PRECISION)
    for r in range(SHARED):
        n = k * SHARED + r
        d_scores = tl.zeros([BLOCK, BLOCK], tl.float32)
        for column in tl.static_range(0, P, COLUMNS):
            v = load_rows(value, first, in_row, k, column, K, H, COLUMNS)
            do = load_rows(d_out, first, in_row, n, column, N, H, COLUMNS)
            d_scores = _dot_transposed(v, do, d_scores, PRECISION)
        d_scores = tl.where(seen, d_scores, 0.0).to(d_states.dtype.element_ty)
        raw = load_rows(query, first, in_row, n, 0, N, H, P).to(tl.float32)
        f = half_features(raw, H, P, SOFTMAX).to(d_scores.dtype)
        d_plus = tl.dot(d_scores, f, d_plus, input_precision=PRECISION)
        f = half_features(-raw, H, P, SOFTMAX).to(d_scores.dtype)
        d_minus = tl.dot(d_scores, f, d_minus, input_precision=PRECISION)
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
    documents,  # [B, T] int32; read only if SEGMENTED
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
    """One program takes one block and goes through the query heads of a key head, one half of the features at a time.

    The scores' gradient is made once a head.
    """
    SHARED: tl.constexpr = N // K
    k = tl.program_id(0) % K
    block = tl.program_id(0) // K
    row = tl.program_id(1).to(tl.int64)
    in_row, first, seen, reads, _ = _tokens(documents, row, block, tokens, BLOCK, SEGMENTED)
    state = states + ((row * K + k) * tl.cdiv(tokens, BLOCK) + block) * (2 * P * P)
    raw = load_rows(key, first, in_row, k, 0, K, H, P).to(tl.float32)
    key_plus = half_features(raw, H, P, SOFTMAX).to(states.dtype.element_ty)
    key_minus = half_features(-raw, H, P, SOFTMAX).to(states.dtype.element_ty)
    for r in range(SHARED):
        n = k * SHARED + r
        d_scores = tl.zeros([BLOCK, BLOCK], tl.float32)
        for column in tl.static_range(0, P, COLUMNS):
            v = load_rows(value, first, in_row, k, column, K, H, COLUMNS)
            do = load_rows(d_out, first, in_row, n, column, N, H, COLUMNS)
            d_scores = _dot_transposed(do, v, d_scores, PRECISION)
        d_scores = tl.where(seen, d_scores, 0.0).to(states.dtype.element_ty)
        raw = load_rows(query, first, in_row, n, 0, N, H, P).to(tl.float32)
        of_head = initial
        if INITIAL_HEADS:
            of_head = initial_of(initial, row, n, k, H, K, INITIAL_ROWS, INITIAL_HEADS)
        d_f = tl.dot(d_scores, key_plus, input_precision=PRECISION)
        d_f = _through_states(
            d_f, d_out, state, of_head, 0, first, in_row, reads, n,
            N, H, P, COLUMNS, SEGMENTED, PRECISION, INITIAL_HEADS,
        )  # fmt: skip
        d_raw = pull_back(half_features(raw, H, P, SOFTMAX), d_f, SOFTMAX)
        d_f = tl.dot(d_scores, key_minus, input_precision=PRECISION)
        d_f = _through_states(
            d_f, d_out, state, of_head, 1, first, in_row, reads, n,
            N, H, P, COLUMNS, SEGMENTED, PRECISION, INITIAL_HEADS,
        )  # fmt: skip
        d_raw -= pull_back(half_features(-raw, H, P, SOFTMAX), d_f, SOFTMAX)
        store_rows(d_query, first, in_row, n, 0, d_raw, N, H, P)


@triton.jit
def _through_states(
    d_f, d_out, state, initial, half, first, in_row, reads, n,
    N: tl.constexpr, H: tl.constexpr, P: tl.constexpr, COLUMNS: tl.constexpr,
    SEGMENTED: tl.constexpr, PRECISION: tl.constexpr, INITIAL_HEADS: tl.constexpr,
):  # fmt: skip
    """Adds d_out (S_0 + S_c)^T for one half of the features."""
    for column in tl.static_range(0, P, COLUMNS):
        do = load_rows(d_out, first, in_row, n, column, N, H, COLUMNS)
        if INITIAL_HEADS:
            right = load_initial(initial, half, column, H, P, COLUMNS)
            d_f = _dot_transposed(do, right.to(do.dtype), d_f, PRECISION)
        if SEGMENTED:
            do = tl.where(reads[:, None], do, 0.0).to(do.dtype)
        d_f = _dot_transposed(do, load_state(state, half, column, P, COLUMNS), d_f, PRECISION)
    return d_f


@triton.jit
def _dot_transposed(left, right, acc, PRECISION: tl.constexpr):
    """acc + left right^T."""
    return tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)


@triton.jit
def _tokens(documents, row, block, tokens, BLOCK: tl.constexpr, SEGMENTED: tl.constexpr):
    """Which tokens of a block are in the row, their places, who sees whom, who reads S_c, and whom G_c is of."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    in_row = token < tokens
    first = row * tokens + block * BLOCK
    seen = token[:, None] >= token[None, :]
    reads = in_row
    is_read = in_row
    if SEGMENTED:
        document = tl.load(documents + row * tokens + token, mask=in_row, other=0)
        seen = seen & (document[:, None] == document[None, :])
        reads = in_row & (document == document_before(documents, row, block, tokens, BLOCK))
        is_read = in_row & (document == document_before(documents, row, block + 1, tokens, BLOCK))
    return in_row, first, seen, reads, is_read


def values_launch(p: LinearProblem) -> Launch:
    """`linear_attention_values`; the inputs are those of the kernel in their order, as they are below."""
    parts = p.padded // p.columns
    return _launch(p, linear_attention_values, p.key_heads, p.key_heads * parts)


def keys_launch(p: LinearProblem) -> Launch:
    """`linear_attention_keys`."""
    return _launch(p, linear_attention_keys, p.key_heads, p.key_heads)


def queries_launch(p: LinearProblem) -> Launch:
    """`linear_attention_queries`."""
    return _launch(p, linear_attention_queries, p.num_heads, p.key_heads, p.initial_constants())


def _launch(p: LinearProblem, kernel, heads: int, programs: int, more: tuple[tuple[str, int], ...] = ()) -> Launch:
    return Launch(
        kernel=kernel,
        grid=(p.blocks * programs, p.batch),
        integers=(p.tokens,),
        outputs=(((p.batch, p.tokens, heads, p.head_dim), p.dtype),),
        constants=(*p.constants(), *more),
        num_warps=8 if p.padded > 64 else 4,
        num_stages=1,
    )
