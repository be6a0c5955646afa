"""Attention of every token to the summaries of earlier chunks and to its own running pair.

With scores in powers of two, s_tc = q_t . K_c / (sqrt(H) ln 2), current score s_t, summaries K, V, running value v~_t:

    out_t = sigmoid(z_t) o_t,   o_t = (2^(s_t - m) v~_t + sum_c 2^(s_tc - m) V_c) / (2^(s_t - m) + sum_c 2^(s_tc - m)).

The online softmax starts from the current pair (m = s_t, sum 1), so that a token without earlier chunks needs no
case of its own; its value joins at the end, when it is read together with z.
"""

import triton
import triton.language as tl

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch, little_shared_memory
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.triton_tiling import NEVER, padded_head_dim

NO_TOKEN = tl.constexpr(NEVER)


@triton.jit(do_not_specialize=["tokens", "slots"])
def rat_attention_forward(
    projected,  # [B, T, 3 D + 2 G H], of which z is read
    running_values,  # [B, T, N, H]
    current_scores,  # [B, N, T] float32
    rotated_queries,  # [B, T, G, H], scaled
    summary_keys,  # [B, C, N, H]
    summary_values,  # [B, C, N, H]
    segment_ids,  # [B, T] int32; read only if SEGMENTED, as are the next four
    first_slots,  # [B, T] int32: the first slot that may belong to the token's document
    end_slots,  # [B, T] int32: one past the last slot that the token may see
    slot_tokens,  # [B, C] int32: see `Documents` in `rat`
    slot_segments,  # [B, C] int32
    tokens,  # T
    slots,  # C
    out,  # [B, T, D]
    lse,  # [B, N, T] float32
    L: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    SEGMENTED: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    PADDED: tl.constexpr,
    GROUPED: tl.constexpr,  # a program goes through the heads of a group
    EARLY: tl.constexpr,  # read z and the current value before the summaries
    PRECISION: tl.constexpr,
):
    """One program computes QUERIES tokens, of one head or of a group's; the last blocks, the longest, start first."""
    D: tl.constexpr = N * H
    blocks = tl.cdiv(tokens, QUERIES)
    row = tl.program_id(1).to(tl.int64)
    if GROUPED:
        g = tl.program_id(0) % G
        start = (blocks - 1 - tl.program_id(0) // G) * QUERIES
    else:
        g = tl.program_id(0) // blocks
        start = (blocks - 1 - tl.program_id(0) % blocks) * QUERIES
    token = start + tl.arange(0, QUERIES)
    channel = tl.arange(0, PADDED)
    in_row = token < tokens
    mask = in_row[:, None] & (channel < H)[None, :]
    at = (row * tokens + token)[:, None] * (G * H) + (g % G) * H + channel[None, :]
    q = tl.load(rotated_queries + at, mask=mask, other=0.0)
    segment = token
    if SEGMENTED:
        segment = tl.load(segment_ids + row * tokens + token, mask=in_row, other=0)
        begin = tl.load(first_slots + row * tokens + start) // KEYS * KEYS
        whole = begin
        end = tl.load(end_slots + row * tokens + tl.minimum(start + QUERIES, tokens) - 1)
    else:
        begin = 0
        whole = start // L // KEYS * KEYS
        end = (tl.minimum(start + QUERIES, tokens) - 1) // L
    slot_base = row * slots
    if GROUPED:
        for n in range(g, N, G):
            _one_head(
                projected, running_values, current_scores, summary_keys + slot_base * D, summary_values + slot_base * D,
                slot_tokens + slot_base, slot_segments + slot_base, out, lse,
                q, row, n, token, segment, begin, whole, end, tokens,
                N, G, L, H, KEYS, PADDED, SEGMENTED, EARLY, PRECISION,
            )  # fmt: skip
    else:
        _one_head(
            projected, running_values, current_scores, summary_keys + slot_base * D, summary_values + slot_base * D,
            slot_tokens + slot_base, slot_segments + slot_base, out, lse,
            q, row, g, token, segment, begin, whole, end, tokens,
            N, G, L, H, KEYS, PADDED, SEGMENTED, EARLY, PRECISION,
        )  # fmt: skip


@triton.jit
def _one_head(
    projected, running_values, current_scores, summary_keys, summary_values, slot_tokens, slot_segments, out, lse,
    q, row, n, token, segment, begin, whole, end, tokens,
    N: tl.constexpr, G: tl.constexpr, L: tl.constexpr, H: tl.constexpr, KEYS: tl.constexpr, PADDED: tl.constexpr,
    SEGMENTED: tl.constexpr, EARLY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of a block of tokens for one head, through both loops: blocks that all tokens see, then the rest."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    channel = tl.arange(0, PADDED)
    in_row = token < tokens
    mask = in_row[:, None] & (channel < H)[None, :]
    offset = (row * tokens + token)[:, None]
    narrow = offset * D + n * H + channel[None, :]
    wide = offset * WIDTH + n * H + channel[None, :]
    scores_at = (row * N + n) * tokens + token
    own = tl.load(current_scores + scores_at, mask=in_row, other=0.0)
    if EARLY:
        value = tl.load(running_values + narrow, mask=mask, other=0.0)
        z = tl.load(projected + wide, mask=mask, other=0.0)
    m = own
    weight = tl.zeros_like(own) + 1.0
    acc = tl.zeros([q.shape[0], PADDED], tl.float32)
    for first in range(begin, whole, KEYS):
        m, weight, acc = _attend(
            q, m, weight, acc, summary_keys + n * H, summary_values + n * H, slot_tokens, slot_segments, first, end,
            token, segment, D, L, H, KEYS, PADDED, False, SEGMENTED, PRECISION,
        )  # fmt: skip
    for first in range(whole, end, KEYS):
        m, weight, acc = _attend(
            q, m, weight, acc, summary_keys + n * H, summary_values + n * H, slot_tokens, slot_segments, first, end,
            token, segment, D, L, H, KEYS, PADDED, True, SEGMENTED, PRECISION,
        )  # fmt: skip
    if not EARLY:
        value = tl.load(running_values + narrow, mask=mask, other=0.0)
        z = tl.load(projected + wide, mask=mask, other=0.0)
    share = tl.exp2(own - m) / weight
    y = acc * (1.0 / weight)[:, None] + value.to(tl.float32) * share[:, None]
    tl.store(out + narrow, (y * tl.sigmoid(z.to(tl.float32))).to(out.dtype.element_ty), mask=mask)
    tl.store(lse + scores_at, m + tl.log2(weight), mask=in_row)


@triton.jit
def _attend(
    q, m, weight, acc, key_base, value_base, slot_tokens, slot_segments, first, end, token, segment,
    D: tl.constexpr, L: tl.constexpr, H: tl.constexpr, KEYS: tl.constexpr, PADDED: tl.constexpr,
    MASKED: tl.constexpr, SEGMENTED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of summaries joins the online softmax."""
    slot = first + tl.arange(0, KEYS)
    valid, slot_token, slot_segment = read_slots(slot, end, slot_tokens, slot_segments, MASKED, SEGMENTED)
    k = load_summaries(key_base, slot, valid, D, H, PADDED, MASKED)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        seen = sees(
            token[:, None], segment[:, None],
            slot[None, :], valid[None, :], slot_token[None, :], slot_segment[None, :], L, SEGMENTED,
        )  # fmt: skip
        scores = tl.where(seen, scores, -float("inf"))
    largest = tl.maximum(m, tl.max(scores, axis=1))
    p = tl.exp2(scores - largest[:, None])
    shrink = tl.exp2(m - largest)
    v = load_summaries(value_base, slot, valid, D, H, PADDED, MASKED)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return largest, weight * shrink + tl.sum(p, axis=1), acc


@triton.jit
def read_slots(slot, end, slot_tokens, slot_segments, MASKED: tl.constexpr, SEGMENTED: tl.constexpr):
    """Which slots of a block may be read, and where their chunks end."""
    valid = slot < end
    slot_token = slot
    slot_segment = slot
    if MASKED and SEGMENTED:
        slot_token = tl.load(slot_tokens + slot, mask=valid, other=NO_TOKEN)
        slot_segment = tl.load(slot_segments + slot, mask=valid, other=0)
        valid = valid & (slot_token < NO_TOKEN)
    return valid, slot_token, slot_segment


@triton.jit
def sees(token, segment, slot, valid, slot_token, slot_segment, L: tl.constexpr, SEGMENTED: tl.constexpr):
    """Whether a token attends to a slot: the slot's chunk is complete, earlier, and of the token's document."""
    if SEGMENTED:
        return valid & (slot_token < token) & (slot_segment == segment)
    return valid & (slot < token // L)


@triton.jit
def load_summaries(base, slot, valid, D: tl.constexpr, H: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    channel = tl.arange(0, PADDED)
    at = base + slot.to(tl.int64)[:, None] * D + channel[None, :]
    if MASKED:
        return tl.load(at, mask=valid[:, None] & (channel < H)[None, :], other=0.0)
    if H != PADDED:
        return tl.load(at, mask=(channel < H)[None, :], other=0.0)
    return tl.load(at)


def forward_launch(shape: RatShape, slots: int | None = None) -> Launch:
    """`rat_attention_forward` for these sizes; the inputs are those of the kernel in their order.

    Args:
      shape: sizes.
      slots: C, where the summaries are those of a cache. None: one for every L tokens.
    """
    queries, keys, num_warps, num_stages = forward_blocks(shape)
    return Launch(
        kernel=rat_attention_forward,
        grid=((shape.num_groups if is_short(shape) else shape.num_heads) * cdiv(shape.tokens, queries), shape.batch),
        integers=(shape.tokens, shape.num_chunks if slots is None else slots),
        outputs=(
            ((shape.batch, shape.tokens, shape.width), shape.dtype),
            ((shape.batch, shape.num_heads, shape.tokens), "float32"),
        ),
        constants=(
            *attention_constants(shape, queries, keys),
            ("GROUPED", is_short(shape)),
            ("EARLY", is_short(shape)),
        ),
        num_warps=num_warps,
        num_stages=num_stages,
    )


def attention_constants(shape: RatShape, queries: int, keys: int) -> tuple[tuple[str, int | bool | str], ...]:
    """The constants that the attention kernels share."""
    return (
        ("L", shape.chunk_size),
        ("N", shape.num_heads),
        ("G", shape.num_groups),
        ("H", shape.head_dim),
        ("SEGMENTED", shape.segmented),
        ("QUERIES", queries),
        ("KEYS", keys),
        ("PADDED", padded_head_dim(shape)),
        ("PRECISION", "ieee"),
    )


def is_short(shape: RatShape) -> bool:
    """Whether memory rather than matrix products takes most of the time."""
    return shape.num_chunks <= 512


def forward_blocks(shape: RatShape) -> tuple[int, int, int, int]:
    """Queries and keys of a block, warps and pipeline stages; measured for head_dim 128 in bfloat16."""
    if shape.dtype == "float32":
        return (32, 32, 8, 1) if padded_head_dim(shape) <= 128 else (32, 16, 8, 1)
    if padded_head_dim(shape) > 128:
        return 64, 32, 8, 2
    if is_short(shape):
        return 64, 32, 4, 2
    return (64, 64, 4, 2) if shape.num_chunks <= 2048 or little_shared_memory(shape.capability) else (128, 64, 8, 3)
