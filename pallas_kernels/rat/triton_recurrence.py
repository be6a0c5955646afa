"""The gated recurrence inside chunks: running keys and values, summaries, current-token scores.

For every head and channel, with f = sigmoid(g + gate_bias) and the state zero at a chunk's start (arXiv 2507.04416):

    v~_t = f_t v~_{t-1} + (1 - f_t) v_t        k~_t = f_t k~_{t-1} + (1 - f_t) k_t        all in float32.
"""

import triton
import triton.language as tl

from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import Launch
from pallas_kernels.launch.triton_math import sigmoids
from pallas_kernels.rat.shape import RatShape


@triton.jit(do_not_specialize=["tokens"])
def rat_recurrence_forward(
    projected,  # [B, T, 3 D + 2 G H]
    gate_bias,  # [D] float32
    cosines,  # [C, H / 2] float32, by chunk index
    sines,
    positions,  # [B, T] int32; read only if SEGMENTED
    chunk_starts,  # [B, T] int32: array index of the chunk's first token, -1 for padding; read only if SEGMENTED
    state_keys,  # [B, N, H] float32: k~ before the row's first token; read only if CONTINUED, as are the next two
    state_values,  # [B, N, H] float32: v~
    last_indices,  # [B] int32: array index of the row's last token
    tokens,  # T
    running_values,  # [B, T, N, H]: v~
    current_scores,  # [B, N, T] float32: q_t . k~_t SCORE_SCALE
    rotated_queries,  # [B, T, G, H]: q by its chunk's angle, times SCORE_SCALE
    summary_keys,  # [B, C, N, H]: k~ at the chunk's last token, by its chunk's angle
    summary_values,  # [B, C, N, H]
    last_keys,  # [B, N, H] float32: k~ after the row's last token; written only if CONTINUED, and if there is one
    last_values,  # [B, N, H] float32
    L: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    ROPE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    CONTINUED: tl.constexpr,  # the chunk of a row's first token may have begun before it
    SCORE_SCALE: tl.constexpr,
    CHUNKS: tl.constexpr,  # chunks of a program, in parallel
    HALF_PADDED: tl.constexpr,
    AHEAD: tl.constexpr,  # tokens loaded before the first of them is used; divides the steps
):
    """One program scans one head of CHUNKS chunks, channels i and i + H / 2 together, to be rotated."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    HALF: tl.constexpr = (H + 1) // 2
    STEPS: tl.constexpr = 2 * L if SEGMENTED else L
    n = tl.program_id(0) % N
    g = n % G
    row = tl.program_id(1).to(tl.int64)
    slots = tl.cdiv(tokens, L)
    chunk = (tl.program_id(0) // N) * CHUNKS + tl.arange(0, CHUNKS)
    half = tl.arange(0, HALF_PADDED)
    low = (half < HALF)[None, :]
    high = (HALF + half < H)[None, :]
    bias_low = tl.load(gate_bias + n * H + half, mask=half < HALF, other=0.0)[None, :]
    bias_high = tl.load(gate_bias + n * H + HALF + half, mask=HALF + half < H, other=0.0)[None, :]

    first = chunk * L
    token_row = row * tokens + first  # int64
    base = projected + (token_row * WIDTH)[:, None] + half[None, :]
    value_base = running_values + (token_row * D)[:, None] + n * H + half[None, :]
    query_base = rotated_queries + (token_row * (G * H))[:, None] + g * H + half[None, :]
    score_base = current_scores + (row * N + n) * tokens + first

    k_low = tl.zeros([CHUNKS, HALF_PADDED], tl.float32)
    k_high = tl.zeros([CHUNKS, HALF_PADDED], tl.float32)
    v_low = tl.zeros([CHUNKS, HALF_PADDED], tl.float32)
    v_high = tl.zeros([CHUNKS, HALF_PADDED], tl.float32)
    cos, sin = k_low, k_low
    if CONTINUED:
        state_at = ((row * N + n) * H + half)[None, :] + chunk[:, None] * 0  # one row's, for every chunk
        before_k = load_halves(state_keys + state_at, chunk >= 0, low, high, HALF)
        before_v = load_halves(state_values + state_at, chunk >= 0, low, high, HALF)
        last_index = tl.load(last_indices + row)
    if ROPE and not SEGMENTED:
        cos, sin = _load_angles(cosines, sines, chunk, chunk < slots, half, HALF)

    for start in range(0, STEPS, AHEAD):
        ahead = ()
        for i in tl.static_range(AHEAD):
            j = start + i
            in_row = first + j < tokens
            if SEGMENTED:
                position = tl.load(positions + token_row + j, mask=in_row, other=0)
                chunk_start = tl.load(chunk_starts + token_row + j, mask=in_row, other=-1)
                use = (chunk_start >= first) & (chunk_start < first + L)
                starts = chunk_start == first + j
                ahead = ahead + ((position, starts, use, in_row & (j < L) & (chunk_start < 0)),)  # noqa: RUF005
            else:
                use = in_row
                ahead = ahead + ((chunk, use, use, use),)  # noqa: RUF005
            at = base + j * WIDTH
            ahead = ahead + (  # noqa: RUF005
                (
                    load_halves(at + D + n * H, use, low, high, HALF),
                    load_halves(at + 2 * D + n * H, use, low, high, HALF),
                    load_halves(at + 3 * D + g * H, use, low, high, HALF),
                    load_halves(at + 3 * D + (G + g) * H, use, low, high, HALF),
                ),
            )
        for i in tl.static_range(AHEAD):
            j = start + i
            position, starts, use, is_padding = ahead[2 * i]
            value, gate, query, key = ahead[2 * i + 1]
            f_low, w_low = gates(gate[0].to(tl.float32) + bias_low, use[:, None], SEGMENTED)
            f_high, w_high = gates(gate[1].to(tl.float32) + bias_high, use[:, None], SEGMENTED)
            if SEGMENTED:
                keep = tl.where(starts, 0.0, 1.0)[:, None]
                v_low, v_high, k_low, k_high = v_low * keep, v_high * keep, k_low * keep, k_high * keep
                if CONTINUED:
                    inside = (starts & (position % L != 0))[:, None]
                    v_low, v_high = tl.where(inside, before_v[0], v_low), tl.where(inside, before_v[1], v_high)
                    k_low, k_high = tl.where(inside, before_k[0], k_low), tl.where(inside, before_k[1], k_high)
            v_low = f_low * v_low + w_low * value[0].to(tl.float32)
            v_high = f_high * v_high + w_high * value[1].to(tl.float32)
            k_low = f_low * k_low + w_low * key[0].to(tl.float32)
            k_high = f_high * k_high + w_high * key[1].to(tl.float32)
            q_low = query[0].to(tl.float32) * SCORE_SCALE
            q_high = query[1].to(tl.float32) * SCORE_SCALE
            if SEGMENTED:
                write = use | is_padding
                out_low = tl.where(use[:, None], v_low, 0.0)
                out_high = tl.where(use[:, None], v_high, 0.0)
            else:
                write = use
                out_low, out_high = v_low, v_high
            store_halves(value_base + j * D, (out_low, out_high), write, low, high, HALF)
            tl.store(score_base + j, tl.sum(q_low * k_low + q_high * k_high, axis=1), mask=write)
            if SEGMENTED and ROPE:
                cos, sin = _load_angles(cosines, sines, position // L, write, half, HALF)
            if n < G:
                if ROPE:
                    q_low, q_high = q_low * cos - q_high * sin, q_high * cos + q_low * sin
                store_halves(query_base + j * (G * H), (q_low, q_high), write, low, high, HALF)
            if SEGMENTED:
                ends = use & (position % L == L - 1)
                slot = ((row * slots + (first + j) // L) * D)[:, None] + n * H + half[None, :]
                _store_summary(
                    (summary_keys + slot, summary_values + slot), (k_low, k_high), (v_low, v_high), (cos, sin),
                    ends, low, high, HALF, ROPE,
                )  # fmt: skip
            if CONTINUED:
                is_last = use & (first + j == last_index)
                store_halves(last_keys + state_at, (k_low, k_high), is_last, low, high, HALF)
                store_halves(last_values + state_at, (v_low, v_high), is_last, low, high, HALF)
    if not SEGMENTED:
        slot = ((row * slots + chunk) * D)[:, None] + n * H + half[None, :]
        _store_summary(
            (summary_keys + slot, summary_values + slot), (k_low, k_high), (v_low, v_high), (cos, sin),
            first + L <= tokens, low, high, HALF, ROPE,
        )  # fmt: skip


@triton.jit
def gates(x, use, IDENTITY: tl.constexpr):
    """The gate f = sigmoid(x) and w = 1 - f, each to full relative precision; if IDENTITY, (1, 0) unless `use`."""
    f, w = sigmoids(x)
    if IDENTITY:
        f = tl.where(use, f, 1.0)
        w = tl.where(use, w, 0.0)
    return f, w


@triton.jit
def load_halves(at, rows, low, high, HALF: tl.constexpr):
    """The channels i < H / 2 and the channels H / 2 + i of [rows, H] values."""
    return (
        tl.load(at, mask=rows[:, None] & low, other=0.0),
        tl.load(at + HALF, mask=rows[:, None] & high, other=0.0),
    )


@triton.jit
def store_halves(at, halves, rows, low, high, HALF: tl.constexpr):
    tl.store(at, halves[0].to(at.dtype.element_ty), mask=rows[:, None] & low)
    tl.store(at + HALF, halves[1].to(at.dtype.element_ty), mask=rows[:, None] & high)


@triton.jit
def _load_angles(cosines, sines, index, rows, half, HALF: tl.constexpr):
    at = index[:, None] * HALF + half[None, :]
    mask = rows[:, None] & (half < HALF)[None, :]
    return tl.load(cosines + at, mask=mask, other=1.0), tl.load(sines + at, mask=mask, other=0.0)


@triton.jit
def _store_summary(at, key, value, angles, rows, low, high, HALF: tl.constexpr, ROPE: tl.constexpr):
    """Stores finished states as a summary, the key rotated by its chunk's angle."""
    if ROPE:
        cos, sin = angles
        key = (key[0] * cos - key[1] * sin, key[1] * cos + key[0] * sin)
    store_halves(at[0], key, rows, low, high, HALF)
    store_halves(at[1], value, rows, low, high, HALF)


def forward_launch(shape: RatShape) -> Launch:
    """`rat_recurrence_forward` for these sizes; the inputs are those of the kernel in their order."""
    state = (shape.batch, shape.num_heads, shape.head_dim) if shape.continued else (1, 1, 1)
    steps = 2 * shape.chunk_size if shape.segmented else shape.chunk_size
    half_padded = next_power_of_2(cdiv(shape.head_dim, 2))
    chunks = max(1, min(next_power_of_2(shape.num_chunks), 256 // half_padded))
    return Launch(
        kernel=rat_recurrence_forward,
        grid=(shape.num_heads * cdiv(shape.num_chunks, chunks), shape.batch),
        integers=(shape.tokens,),
        outputs=(
            ((shape.batch, shape.tokens, shape.num_heads, shape.head_dim), shape.dtype),
            ((shape.batch, shape.num_heads, shape.tokens), "float32"),
            ((shape.batch, shape.tokens, shape.num_groups, shape.head_dim), shape.dtype),
            ((shape.batch, shape.num_chunks, shape.num_heads, shape.head_dim), shape.dtype),
            ((shape.batch, shape.num_chunks, shape.num_heads, shape.head_dim), shape.dtype),
            (state, "float32"),
            (state, "float32"),
        ),
        constants=(
            *size_constants(shape),
            ("CONTINUED", shape.continued),
            ("SCORE_SCALE", shape.score_scale),
            ("CHUNKS", chunks),
            ("HALF_PADDED", half_padded),
            ("AHEAD", next(n for n in (4, 2, 1) if steps % n == 0)),
        ),
        num_warps=2,
        num_stages=1,
    )


def size_constants(shape: RatShape) -> tuple[tuple[str, int | bool], ...]:
    """The constants that the recurrence kernels share."""
    return (
        ("L", shape.chunk_size),
        ("N", shape.num_heads),
        ("G", shape.num_groups),
        ("H", shape.head_dim),
        ("ROPE", shape.rope),
        ("SEGMENTED", shape.segmented),
    )
