"""Gradients of the gated delta rule: back through the chunks of rows in order, then every chunk by itself.

Of a chunk, with K, Q, V and u [L, H], S before and S' after it, f and e what is kept from its start and to its end, P
the scores, X = (I + A)^-1, D the decays, and d of each the gradient:

    du = P^T dO + e (K dS')    dw = X^T du    dV = b dw    dS = f_L dS' + Q^T (f dO) - K^T (b f dw)
    dP = tril(dO u^T)    dA = -tril(dw u^T, -1)    M = b D dA
    dQ = f (dO S^T) + (D dP) K    dK = (D dP)^T Q + e (u dS'^T) - b f (dw S^T) + (M + M^T) K.

Gradients of log decays are sums over pairs of tokens on both of their sides: of E = P dP + A dA those of the rows up
from a token, less those of the columns.
"""

import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule.triton_tiles import (
    decays,
    load_numbers,
    load_state,
    load_tokens,
    square,
    store_state,
    store_tokens,
)
from pallas_kernels.gated_delta_rule.triton_tiling import Tiling
from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch


@triton.jit(do_not_specialize=["tokens"])
def gated_delta_d_states(
    query,  # [B, T, N, HK]
    key,  # [B, T, N, HK]
    write_strength,  # [B, T, N] float32
    d_out,  # [B, T, N, HV]
    solve,  # [B, N, C, L, L]
    scores,  # [B, N, C, L, L]
    from_start,  # [B, N, C, L] float32
    to_end,  # [B, N, C, L] float32
    d_final,  # [B, N, HK, HV] float32
    tokens,  # T
    d_wanted,  # [B, T, N, HV]: dw
    d_states,  # [B, N, C, HK, HV]: of the state after each chunk
    d_initial,  # [B, N, HK, HV] float32
    N: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program goes back through a row with COLUMNS value channels of a head."""
    PARTS: tl.constexpr = (HV + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % PARTS * COLUMNS
    n = tl.program_id(0) // PARTS
    row = tl.program_id(1).to(tl.int64)
    chunks = tl.cdiv(tokens, CHUNK)
    i = tl.arange(0, CHUNK)
    dtype = key.dtype.element_ty
    d_state = load_state(d_final, row * N + n, column, HK, HV, KEYS, COLUMNS)
    for step in range(chunks):
        chunk = chunks - 1 - step
        at_chunk = (row * N + n) * chunks + chunk
        k = load_tokens(key, row, chunk, tokens, n, 0, N, HK, CHUNK, KEYS)
        q = load_tokens(query, row, chunk, tokens, n, 0, N, HK, CHUNK, KEYS)
        do = load_tokens(d_out, row, chunk, tokens, n, column, N, HV, CHUNK, COLUMNS)
        solved = tl.load(solve + square(at_chunk, CHUNK))
        weights = tl.load(scores + square(at_chunk, CHUNK))
        strength = load_numbers(write_strength, row, chunk, tokens, n, N, CHUNK)
        first = tl.load(from_start + at_chunk * CHUNK + i)
        last = tl.load(to_end + at_chunk * CHUNK + i)
        kept = tl.load(from_start + at_chunk * CHUNK + CHUNK - 1)
        rounded = d_state.to(dtype)
        store_state(d_states, rounded, at_chunk, column, HK, HV, KEYS, COLUMNS)
        d_u = last[:, None] * tl.dot(k, rounded)
        d_u = tl.dot(tl.trans(weights), do, d_u)
        d_w = tl.dot(tl.trans(solved), d_u.to(dtype))
        store_tokens(d_wanted, d_w, row, chunk, tokens, n, column, N, HV, CHUNK, COLUMNS)
        d_held = (-(strength * first)[:, None] * d_w).to(dtype)
        read = (first[:, None] * do.to(tl.float32)).to(dtype)
        d_state = tl.dot(tl.trans(q), read, kept * d_state)
        d_state = tl.dot(tl.trans(k), d_held, d_state)
    store_state(d_initial, d_state, row * N + n, column, HK, HV, KEYS, COLUMNS)


@triton.jit(do_not_specialize=["tokens"])
def gated_delta_gradients(
    query,  # [B, T, N, HK]
    key,  # [B, T, N, HK]
    value,  # [B, T, N, HV]
    log_decay,  # [B, T, N] float32
    write_strength,  # [B, T, N] float32
    starts,  # [B, T] int32; read only if SEGMENTED
    d_out,  # [B, T, N, HV]
    scores,  # [B, N, C, L, L]
    from_start,  # [B, N, C, L] float32
    to_end,  # [B, N, C, L] float32
    corrections,  # [B, T, N, HV]
    states,  # [B, N, C, HK, HV]
    d_wanted,  # [B, T, N, HV]
    d_states,  # [B, N, C, HK, HV]
    tokens,  # T
    d_query,  # [B, T, N, HK]
    d_key,  # [B, T, N, HK]
    d_value,  # [B, T, N, HV]
    d_log_decay,  # [KEYS / K_COLUMNS, B, T, N] float32: sums to be added up
    d_strength,  # [KEYS / K_COLUMNS, B, T, N] float32
    N: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    K_COLUMNS: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """One program takes K_COLUMNS key channels of a chunk of a head, and COLUMNS value channels at a time.

    The first of a chunk computes what has no key channels.
    """
    PARTS: tl.constexpr = KEYS // K_COLUMNS
    part = tl.program_id(0) % PARTS
    n = tl.program_id(0) // PARTS % N
    chunk = tl.program_id(0) // (PARTS * N)
    row = tl.program_id(1).to(tl.int64)
    at_chunk = (row * N + n) * tl.cdiv(tokens, CHUNK) + chunk
    k_column = part * K_COLUMNS
    i = tl.arange(0, CHUNK)
    dtype = key.dtype.element_ty
    strength = load_numbers(write_strength, row, chunk, tokens, n, N, CHUNK)
    of_writes = tl.zeros([CHUNK, K_COLUMNS], tl.float32)  # dw S^T
    of_reads = tl.zeros([CHUNK, K_COLUMNS], tl.float32)  # dO S^T
    of_adding = tl.zeros([CHUNK, K_COLUMNS], tl.float32)  # u dS'^T
    d_scores = tl.zeros([CHUNK, CHUNK], tl.float32)
    d_overlaps = tl.zeros([CHUNK, CHUNK], tl.float32)
    d_b = tl.zeros([CHUNK], tl.float32)
    of_keeping = tl.zeros([COLUMNS], tl.float32)
    for column in range(0, HV, COLUMNS):
        do = load_tokens(d_out, row, chunk, tokens, n, column, N, HV, CHUNK, COLUMNS)
        u = load_tokens(corrections, row, chunk, tokens, n, column, N, HV, CHUNK, COLUMNS)
        d_w = load_tokens(d_wanted, row, chunk, tokens, n, column, N, HV, CHUNK, COLUMNS)
        state = load_state(states, at_chunk, column, HK, HV, K_COLUMNS, COLUMNS, k_column)
        d_state = load_state(d_states, at_chunk, column, HK, HV, K_COLUMNS, COLUMNS, k_column)
        of_writes = tl.dot(d_w, tl.trans(state), of_writes)
        of_reads = tl.dot(do, tl.trans(state), of_reads)
        of_adding = tl.dot(u, tl.trans(d_state), of_adding)
        d_scores = tl.dot(do, tl.trans(u), d_scores)
        d_overlaps = tl.dot(d_w, tl.trans(u), d_overlaps)
        of_keeping += tl.sum(state.to(tl.float32) * d_state.to(tl.float32), 0)
        own = tl.where(part == 0, column, HV)  # outside of the array but in the first; a branch would hold up loads
        v = load_tokens(value, row, chunk, tokens, n, own, N, HV, CHUNK, COLUMNS)
        d_b += tl.sum(d_w.to(tl.float32) * v.to(tl.float32), 1)
        d_v = strength[:, None] * d_w.to(tl.float32)
        store_tokens(d_value, d_v, row, chunk, tokens, n, own, N, HV, CHUNK, COLUMNS)
    k = load_tokens(key, row, chunk, tokens, n, k_column, N, HK, CHUNK, K_COLUMNS)
    q = load_tokens(query, row, chunk, tokens, n, k_column, N, HK, CHUNK, K_COLUMNS)
    first = tl.load(from_start + at_chunk * CHUNK + i)
    last = tl.load(to_end + at_chunk * CHUNK + i)
    held = tl.sum(k.to(tl.float32) * of_writes, 1)
    d_first = first * (tl.sum(q.to(tl.float32) * of_reads, 1) - strength * held)
    d_last = last * tl.sum(k.to(tl.float32) * of_adding, 1)
    d_kept = tl.sum(tl.where(i == CHUNK - 1, first, 0.0), 0) * tl.sum(of_keeping, 0)
    d_k = last[:, None] * of_adding - (strength * first)[:, None] * of_writes
    d_q = first[:, None] * of_reads
    decay = decays(log_decay, starts, row, chunk, tokens, n, N, CHUNK, SEGMENTED)
    decayed = (decay * d_scores).to(dtype)
    d_q = tl.dot(decayed, k, d_q)
    store_tokens(d_query, d_q, row, chunk, tokens, n, k_column, N, HK, CHUNK, K_COLUMNS)
    d_k = tl.dot(tl.trans(decayed), q, d_k)
    d_overlaps = tl.where(i[:, None] > i[None, :], -decay * d_overlaps, 0.0)
    m = strength[:, None] * d_overlaps
    d_k = tl.dot((m + tl.trans(m)).to(dtype), k, d_k)
    store_tokens(d_key, d_k, row, chunk, tokens, n, k_column, N, HK, CHUNK, K_COLUMNS)
    # Of pairs of tokens: of (b k k) where dA meets this program's key channels, and of scores once.
    pairs = d_overlaps * tl.dot(k, tl.trans(k))
    d_b += tl.sum(pairs, 1) - first * held
    pairs = strength[:, None] * pairs
    if part == 0:
        pairs += tl.load(scores + square(at_chunk, CHUNK)).to(tl.float32) * d_scores
    earlier = tl.cumsum(d_last, 0) - d_last
    later = tl.cumsum(tl.sum(pairs, 1) - tl.sum(pairs, 0) + d_first, 0, reverse=True)
    token = chunk * CHUNK + i
    at = ((part * tl.num_programs(1) + row) * tokens + token) * N + n
    tl.store(d_log_decay + at, later + earlier + d_kept, mask=token < tokens)
    tl.store(d_strength + at, d_b, mask=token < tokens)


def d_states_launch(tiling: Tiling) -> Launch:
    """`gated_delta_d_states`; the inputs are those of the kernel in their order."""
    shape, blocks = tiling.shape, tiling.d_state_blocks
    state = (shape.key_dim, shape.value_dim)
    return Launch(
        kernel=gated_delta_d_states,
        grid=(shape.num_heads * cdiv(shape.value_dim, blocks.columns), shape.batch),
        integers=(shape.tokens,),
        outputs=(
            ((shape.batch, shape.tokens, shape.num_heads, shape.value_dim), shape.dtype),
            ((shape.batch, shape.num_heads, tiling.chunks, *state), shape.dtype),
            ((shape.batch, shape.num_heads, *state), "float32"),
        ),
        constants=(*tiling.constants(), ("COLUMNS", blocks.columns)),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )


def gradients_launch(tiling: Tiling) -> Launch:
    """`gated_delta_gradients`; the inputs are those of the kernel in their order."""
    shape, blocks = tiling.shape, tiling.gradient_blocks
    parts, rows = tiling.keys // tiling.key_columns, (shape.batch, shape.tokens, shape.num_heads)
    return Launch(
        kernel=gated_delta_gradients,
        grid=(parts * shape.num_heads * tiling.chunks, shape.batch),
        integers=(shape.tokens,),
        outputs=(
            ((*rows, shape.key_dim), shape.dtype),
            ((*rows, shape.key_dim), shape.dtype),
            ((*rows, shape.value_dim), shape.dtype),
            ((parts, *rows), "float32"),
            ((parts, *rows), "float32"),
        ),
        constants=(
            *tiling.constants(),
            ("COLUMNS", blocks.columns),
            ("K_COLUMNS", tiling.key_columns),
            ("SEGMENTED", shape.segmented),
        ),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
