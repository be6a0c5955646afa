"""The backward pass of the attention to summaries, from `out` and the log-sum-exp alone.

With the names of `attention`, and lse = log2 of the softmax's sum:

    do = dout sigmoid(z),  dz = dout out (1 - sigmoid(z)),  delta = sum_h dout out = sum_h do o,
    p_tc = 2^(s_tc - lse_t),  ds_tc = p_tc (do_t . V_c - delta_t),  dV_c = sum p do,  dK_c = sum ds q,  dq_t = sum ds K.

Scores that all grow alike change nothing, so sum_c ds_tc + ds_t = 0: the current score's gradient is minus the sum of
the others and needs no running value.
"""

import math

import triton
import triton.language as tl

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch, little_shared_memory
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.triton_attention import attention_constants, is_short, load_summaries, read_slots, sees
from pallas_kernels.rat.triton_tiling import padded_head_dim


@triton.jit(do_not_specialize=["tokens"])
def rat_output_backward(
    projected,  # of which z is read
    out,  # [B, T, D]
    d_out,  # [B, T, D]
    tokens,  # T
    d_projected,  # [B, T, 3 D + 2 G H], of which dz is written
    d_heads,  # [B, T, N, H]: do
    delta,  # [B, N, T] float32
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED: tl.constexpr,
):
    """The output gate backward, and the sum over channels that the softmax's backward needs."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    n = tl.program_id(0) % N
    row = tl.program_id(1).to(tl.int64)
    token = (tl.program_id(0) // N) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, PADDED)
    mask = (token < tokens)[:, None] & (channel < H)[None, :]
    offset = (row * tokens + token)[:, None]
    wide = offset * WIDTH + n * H + channel[None, :]
    narrow = offset * D + n * H + channel[None, :]
    z = tl.load(projected + wide, mask=mask, other=0.0).to(tl.float32)
    dy = tl.load(d_out + narrow, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(out + narrow, mask=mask, other=0.0).to(tl.float32)
    open_ = tl.sigmoid(z)
    product = dy * y
    tl.store(d_heads + narrow, (dy * open_).to(d_heads.dtype.element_ty), mask=mask)
    tl.store(d_projected + wide, (product * (1.0 - open_)).to(d_projected.dtype.element_ty), mask=mask)
    tl.store(delta + (row * N + n) * tokens + token, tl.sum(product, axis=1), mask=token < tokens)


@triton.jit(do_not_specialize=["tokens"])
def rat_queries_backward(
    d_heads,
    delta,
    lse,
    rotated_queries,
    summary_keys,
    summary_values,
    segment_ids,  # read only if SEGMENTED, as are the next four
    first_slots,
    end_slots,
    slot_tokens,
    slot_segments,
    current_scores,
    tokens,  # T
    d_rotated_queries,  # [B, T, G, H] float32: sum over the group's heads, of the unscaled rotated query
    d_current_scores,  # [B, N, T] float32, of the scores in natural units, times SOFTMAX_SCALE
    current_weights,  # [B, N, T] float32: what the softmax gives the current pair
    L: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    SEGMENTED: tl.constexpr,
    SOFTMAX_SCALE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program sums QUERIES tokens over the heads of a group, which share the query."""
    D: tl.constexpr = N * H
    blocks = tl.cdiv(tokens, QUERIES)
    g = tl.program_id(0) % G
    block = blocks - 1 - tl.program_id(0) // G
    row = tl.program_id(1).to(tl.int64)
    slots = tl.cdiv(tokens, L)
    start = block * QUERIES
    token = start + tl.arange(0, QUERIES)
    channel = tl.arange(0, PADDED)
    in_row = token < tokens
    mask = in_row[:, None] & (channel < H)[None, :]
    offset = (row * tokens + token)[:, None]
    query_at = offset * (G * H) + g * H + channel[None, :]
    q = tl.load(rotated_queries + query_at, mask=mask, other=0.0)
    dq = tl.zeros([QUERIES, PADDED], tl.float32)

    segment = token
    begin = 0
    if SEGMENTED:
        segment = tl.load(segment_ids + row * tokens + token, mask=in_row, other=0)
        begin = tl.load(first_slots + row * tokens + start) // KEYS * KEYS
        whole = begin
        end = tl.load(end_slots + row * tokens + tl.minimum(start + QUERIES, tokens) - 1)
    else:
        whole = start // L // KEYS * KEYS
        end = (tl.minimum(start + QUERIES, tokens) - 1) // L
    slot_base = row * slots
    for n in range(g, N, G):
        do = tl.load(d_heads + offset * D + n * H + channel[None, :], mask=mask, other=0.0)
        own = tl.load(delta + (row * N + n) * tokens + token, mask=in_row, other=0.0)
        log_sum = tl.load(lse + (row * N + n) * tokens + token, mask=in_row, other=float("inf"))
        total = tl.zeros([QUERIES], tl.float32)
        key_base = summary_keys + row * slots * D + n * H
        value_base = summary_values + row * slots * D + n * H
        for first in range(begin, whole, KEYS):
            dq, total = _attend_backward(
                q, do, own, log_sum, dq, total, key_base, value_base, slot_tokens + slot_base,
                slot_segments + slot_base, first, end, token, segment,
                D, L, H, KEYS, PADDED, False, SEGMENTED, PRECISION,
            )  # fmt: skip
        for first in range(whole, end, KEYS):
            dq, total = _attend_backward(
                q, do, own, log_sum, dq, total, key_base, value_base, slot_tokens + slot_base,
                slot_segments + slot_base, first, end, token, segment,
                D, L, H, KEYS, PADDED, True, SEGMENTED, PRECISION,
            )  # fmt: skip
        scores_at = (row * N + n) * tokens + token
        score = tl.load(current_scores + scores_at, mask=in_row, other=-float("inf"))
        tl.store(current_weights + scores_at, tl.exp2(score - log_sum), mask=in_row)
        tl.store(d_current_scores + scores_at, -total * SOFTMAX_SCALE, mask=in_row)
    tl.store(d_rotated_queries + query_at, dq * SOFTMAX_SCALE, mask=mask)


@triton.jit
def _attend_backward(
    q, do, own, log_sum, dq, total, key_base, value_base, slot_tokens, slot_segments, first, end, token, segment,
    D: tl.constexpr, L: tl.constexpr, H: tl.constexpr, KEYS: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of summaries adds to the gradient of the queries and to the sum of the scores' gradients."""
    slot = first + tl.arange(0, KEYS)
    valid, slot_token, slot_segment = read_slots(slot, end, slot_tokens, slot_segments, MASKED, SEGMENTED)
    k = load_summaries(key_base, slot, valid, D, H, PADDED, MASKED)
    v = load_summaries(value_base, slot, valid, D, H, PADDED, MASKED)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=PRECISION) - log_sum[:, None])
    if MASKED:
        seen = sees(
            token[:, None], segment[:, None],
            slot[None, :], valid[None, :], slot_token[None, :], slot_segment[None, :], L, SEGMENTED,
        )  # fmt: skip
        p = tl.where(seen, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - own[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION), total + tl.sum(ds, axis=1)


@triton.jit(do_not_specialize=["tokens"])
def rat_summaries_backward(
    d_heads,
    delta,
    lse,
    rotated_queries,
    summary_keys,
    summary_values,
    segment_ids,  # read only if SEGMENTED, as are the next three
    last_tokens,  # [B, ceil(C / KEYS)] int32: where the last document that sees a block of slots ends
    slot_tokens,
    slot_segments,
    tokens,  # T
    d_summary_keys,  # [B, C, N, H] float32, of the rotated key
    d_summary_values,  # [B, C, N, H] float32
    L: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    SEGMENTED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program sums a block of KEYS summaries of one head over all tokens that see them."""
    D: tl.constexpr = N * H
    n = tl.program_id(0) % N
    block = tl.program_id(0) // N
    row = tl.program_id(1).to(tl.int64)
    slots = tl.cdiv(tokens, L)
    channel = tl.arange(0, PADDED)
    slot = block * KEYS + tl.arange(0, KEYS)
    slot_base = row * slots
    complete = slots if SEGMENTED else tokens // L
    valid, slot_token, slot_segment = read_slots(
        slot, complete, slot_tokens + slot_base, slot_segments + slot_base, True, SEGMENTED
    )
    at = row * slots * D + n * H
    k = load_summaries(summary_keys + at, slot, valid, D, H, PADDED, True)
    v = load_summaries(summary_values + at, slot, valid, D, H, PADDED, True)
    dk = tl.zeros([KEYS, PADDED], tl.float32)
    dv = tl.zeros([KEYS, PADDED], tl.float32)
    if SEGMENTED:
        begin = block * KEYS * L
        end = tl.load(last_tokens + row * tl.cdiv(slots, KEYS) + block)
        whole = end
    else:
        begin = (block * KEYS + 1) * L
        end = tokens
        # From here on every token sees every slot of the block.
        whole = tl.minimum(begin + tl.cdiv((KEYS - 1) * L, QUERIES) * QUERIES, end)
    for first in range(begin, whole, QUERIES):
        dk, dv = _gather_backward(
            k, v, dk, dv, d_heads, delta, lse, rotated_queries, segment_ids, first, row, n, tokens,
            slot, valid, slot_token, slot_segment, N, G, L, H, QUERIES, PADDED, True, SEGMENTED, PRECISION,
        )  # fmt: skip
    for first in range(whole, end, QUERIES):
        dk, dv = _gather_backward(
            k, v, dk, dv, d_heads, delta, lse, rotated_queries, segment_ids, first, row, n, tokens,
            slot, valid, slot_token, slot_segment, N, G, L, H, QUERIES, PADDED, False, SEGMENTED, PRECISION,
        )  # fmt: skip
    to = at + slot.to(tl.int64)[:, None] * D + channel[None, :]
    mask = (slot < slots)[:, None] & (channel < H)[None, :]
    tl.store(d_summary_keys + to, dk * 0.6931471805599453, mask=mask)  # ln 2: the queries carry log2(e)
    tl.store(d_summary_values + to, dv, mask=mask)


@triton.jit
def _gather_backward(
    k, v, dk, dv, d_heads, delta, lse, rotated_queries, segment_ids, first, row, n, tokens,
    slot, valid, slot_token, slot_segment,
    N: tl.constexpr, G: tl.constexpr, L: tl.constexpr, H: tl.constexpr, QUERIES: tl.constexpr,
    PADDED: tl.constexpr, MASKED: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries adds to the gradients of a block of summaries."""
    token = first + tl.arange(0, QUERIES)
    channel = tl.arange(0, PADDED)
    in_row = token < tokens
    mask = in_row[:, None] & (channel < H)[None, :]
    offset = (row * tokens + token)[:, None]
    q = tl.load(rotated_queries + offset * (G * H) + (n % G) * H + channel[None, :], mask=mask, other=0.0)
    log_sum = tl.load(lse + (row * N + n) * tokens + token, mask=in_row, other=float("inf"))
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=PRECISION) - log_sum[None, :])
    if MASKED:
        segment = token
        if SEGMENTED:
            segment = tl.load(segment_ids + row * tokens + token, mask=in_row, other=0)
        seen = sees(
            token[None, :], segment[None, :],
            slot[:, None], valid[:, None], slot_token[:, None], slot_segment[:, None], L, SEGMENTED,
        )  # fmt: skip
        p = tl.where(seen, p, 0.0)
    do = tl.load(d_heads + offset * (N * H) + n * H + channel[None, :], mask=mask, other=0.0)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
    own = tl.load(delta + (row * N + n) * tokens + token, mask=in_row, other=0.0)
    ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - own[None, :])
    return tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION), dv


def output_launch(shape: RatShape) -> Launch:
    """`rat_output_backward` for these sizes."""
    tokens = max(1, 2048 // padded_head_dim(shape))
    return Launch(
        kernel=rat_output_backward,
        grid=(shape.num_heads * cdiv(shape.tokens, tokens), shape.batch),
        integers=(shape.tokens,),
        outputs=(
            ((shape.batch, shape.tokens, shape.projected_width), shape.dtype),
            ((shape.batch, shape.tokens, shape.num_heads, shape.head_dim), shape.dtype),
            ((shape.batch, shape.num_heads, shape.tokens), "float32"),
        ),
        constants=(
            ("N", shape.num_heads),
            ("G", shape.num_groups),
            ("H", shape.head_dim),
            ("TOKENS", tokens),
            ("PADDED", padded_head_dim(shape)),
        ),
        num_warps=4,
        num_stages=1,
    )


def queries_launch(shape: RatShape) -> Launch:
    """`rat_queries_backward` for these sizes."""
    queries, keys, num_warps, num_stages = queries_blocks(shape)
    return Launch(
        kernel=rat_queries_backward,
        grid=(shape.num_groups * cdiv(shape.tokens, queries), shape.batch),
        integers=(shape.tokens,),
        outputs=(
            ((shape.batch, shape.tokens, shape.num_groups, shape.head_dim), "float32"),
            ((shape.batch, shape.num_heads, shape.tokens), "float32"),
            ((shape.batch, shape.num_heads, shape.tokens), "float32"),
        ),
        constants=(
            *attention_constants(shape, queries, keys),
            ("SOFTMAX_SCALE", 1 / math.sqrt(shape.head_dim)),
        ),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def summaries_launch(shape: RatShape) -> Launch:
    """`rat_summaries_backward` for these sizes."""
    queries, keys, num_warps, num_stages = summaries_blocks(shape)
    return Launch(
        kernel=rat_summaries_backward,
        grid=(shape.num_heads * cdiv(shape.num_chunks, keys), shape.batch),
        integers=(shape.tokens,),
        outputs=(((shape.batch, shape.num_chunks, shape.num_heads, shape.head_dim), "float32"),) * 2,
        constants=attention_constants(shape, queries, keys),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def queries_blocks(shape: RatShape) -> tuple[int, int, int, int]:
    """Queries and keys of a block, warps and pipeline stages; measured for head_dim 128 in bfloat16."""
    if shape.dtype == "float32":
        return (32, 32, 8, 1) if padded_head_dim(shape) <= 128 else (16, 16, 8, 1)
    if padded_head_dim(shape) > 128:
        return 64, 32, 8, 1
    if is_short(shape):
        return 64, 64, 4, 1
    return (64, 64, 4, 2) if shape.num_chunks <= 2048 or little_shared_memory(shape.capability) else (128, 64, 8, 3)


def summaries_blocks(shape: RatShape) -> tuple[int, int, int, int]:
    """Queries and keys of a block, warps and pipeline stages; measured for head_dim 128 in bfloat16."""
    if shape.dtype == "float32":
        return (32, 32, 8, 1) if padded_head_dim(shape) <= 128 else (16, 16, 8, 1)
    if padded_head_dim(shape) <= 128:
        return 64, 64, 4, 2
    return 32, 64, 8, 1
