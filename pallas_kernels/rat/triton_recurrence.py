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
from pallas_kernels.rat.triton_chunk_runs import first_of_block
from pallas_kernels.rat.triton_tiling import NEVER


@triton.jit(do_not_specialize=["tokens"])
def rat_recurrence_forward(
    projected,  # [B, T, 3 D + 2 G H]
    gate_bias,  # [D] float32
    cosines,  # [C, H / 2] float32, by chunk index
    sines,
    positions,  # [B, T] int32, -1 outside of chunks; read only if SEGMENTED, as are the next two
    runs,  # [B, T] int32, of `triton_chunk_runs.chunk_runs`
    slot_tokens,  # [B, C] int32: NEVER where no token completes the slot's chunk
    state_keys,  # [B, N, H] float32: k~ before the row's first token; read only if CONTINUED, as are the next two
    state_values,  # [B, N, H] float32: v~
    last_indices,  # [B] int32: array index of the row's last token
    tokens,  # T
    running_values,  # [B, T, N, H]: v~
    current_scores,  # [B, N, T] float32: q_t . k~_t SCORE_SCALE
    rotated_queries,  # [B, T, G, H]: q by its chunk's angle, times SCORE_SCALE
    summary_keys,  # [B, C, N, H]: k~ at the last token, by the chunk's angle; if SEGMENTED 0 where none ends
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
    CHUNKS: tl.constexpr,  # blocks of L tokens of a program, whose chunks are scanned in parallel
    HALF_PADDED: tl.constexpr,
    AHEAD: tl.constexpr,  # tokens loaded before the first of them is used; divides L
    NEVER: tl.constexpr,
):
    """One program scans one head of the chunks that start in CHUNKS blocks, a chunk of each at a time.

    Channels i and i + H / 2 are together, to be rotated.
    """
    D: tl.constexpr = N * H
    HALF: tl.constexpr = (H + 1) // 2
    n = tl.program_id(0) % N
    row = tl.program_id(1).to(tl.int64)
    slots = tl.cdiv(tokens, L)
    chunk = (tl.program_id(0) // N) * CHUNKS + tl.arange(0, CHUNKS)
    half = tl.arange(0, HALF_PADDED)
    low = (half < HALF)[None, :]
    high = (HALF + half < H)[None, :]
    if SEGMENTED:
        start = first_of_block(runs, row, chunk, tokens, L)
        end = first_of_block(runs, row, chunk + 1, tokens, L)
        while tl.max(end - start, axis=0) > 0:
            is_run = start < end
            written = tl.load(runs + row * tokens + start, mask=is_run, other=0)
            position = tl.load(positions + row * tokens + start, mask=is_run, other=-1)
            used = tl.where(position < 0, 0, written)
            completes = (used > 0) & ((position + used) % L == 0)
            slot = row * slots + (start + written - 1) // L
            _scan(
                projected, gate_bias, cosines, sines, state_keys, state_values, last_indices, running_values,
                current_scores, rotated_queries, summary_keys, summary_values, last_keys,
                last_values, row, slot, start, position, used, written, completes, tokens, n, half, low, high,
                L, N, G, H, ROPE, CONTINUED, SCORE_SCALE, CHUNKS, HALF_PADDED, AHEAD,
            )  # fmt: skip
            start += written
        never = tl.load(slot_tokens + row * slots + chunk, mask=chunk < slots, other=0) == NEVER
        zero = tl.zeros([CHUNKS, HALF_PADDED], tl.float32)
        slot = ((row * slots + chunk) * D)[:, None] + n * H + half[None, :]
        store_halves(summary_keys + slot, (zero, zero), never, low, high, HALF)
        store_halves(summary_values + slot, (zero, zero), never, low, high, HALF)
    else:
        start = chunk * L
        length = tl.minimum(L, tokens - start)
        _scan(
            projected, gate_bias, cosines, sines, state_keys, state_values, last_indices, running_values,
            current_scores, rotated_queries, summary_keys, summary_values, last_keys, last_values,
            row, row * slots + chunk, start, start, length, length, length == L, tokens, n, half, low, high,
            L, N, G, H, ROPE, CONTINUED, SCORE_SCALE, CHUNKS, HALF_PADDED, AHEAD,
        )  # fmt: skip


@triton.jit
def _scan(
    projected, gate_bias, cosines, sines, state_keys, state_values, last_indices, running_values,
    current_scores, rotated_queries, summary_keys, summary_values, last_keys, last_values,
    row, slot, start, position, used, written, completes, tokens, n, half, low, high,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, CONTINUED: tl.constexpr,
    SCORE_SCALE: tl.constexpr, CHUNKS: tl.constexpr, HALF_PADDED: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One head of CHUNKS chunks in parallel: of each its slot, its first token, where that is in its document, how many
    tokens it has, for how many results are written (padding counts here alone), if it is complete.
    """
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    HALF: tl.constexpr = (H + 1) // 2
    g = n % G
    bias_low = tl.load(gate_bias + n * H + half, mask=half < HALF, other=0.0)[None, :]
    bias_high = tl.load(gate_bias + n * H + HALF + half, mask=HALF + half < H, other=0.0)[None, :]
    token_row = row * tokens + start  # int64
    used_to = start + used  # comparing tokens takes 25 registers less than comparing steps
    written_to = start + written
    base = projected + (token_row * WIDTH)[:, None] + half[None, :]
    value_base = running_values + (token_row * D)[:, None] + n * H + half[None, :]
    query_base = rotated_queries + (token_row * (G * H))[:, None] + g * H + half[None, :]
    score_base = current_scores + (row * N + n) * tokens + start

    k_low = tl.zeros([CHUNKS, HALF_PADDED], tl.float32)
    k_high = tl.zeros([CHUNKS, HALF_PADDED], tl.float32)
    v_low = tl.zeros([CHUNKS, HALF_PADDED], tl.float32)
    v_high = tl.zeros([CHUNKS, HALF_PADDED], tl.float32)
    cos, sin = k_low, k_low
    state_at = ((row * N + n) * H + half)[None, :] + start[:, None] * 0  # one row's, for every chunk
    if CONTINUED:
        begun = (used > 0) & (position % L != 0)
        k_low, k_high = load_halves(state_keys + state_at, begun, low, high, HALF)
        v_low, v_high = load_halves(state_values + state_at, begun, low, high, HALF)
    if ROPE:
        cos, sin = _load_angles(cosines, sines, position // L, used > 0, half, HALF)

    for first in range(0, L, AHEAD):
        ahead = ()
        for i in tl.static_range(AHEAD):
            use = start + (first + i) < used_to
            at = base + (first + i) * WIDTH
            ahead = ahead + (  # noqa: RUF005
                (
                    load_halves(at + D + n * H, use, low, high, HALF),
                    load_halves(at + 2 * D + n * H, use, low, high, HALF),
                    load_halves(at + 3 * D + g * H, use, low, high, HALF),
                    load_halves(at + 3 * D + (G + g) * H, use, low, high, HALF),
                ),
            )
        for i in tl.static_range(AHEAD):
            j = first + i
            use = (start + j < used_to)[:, None]
            write = start + j < written_to
            value, gate, query, key = ahead[i]
            f_low, w_low = gates(gate[0].to(tl.float32) + bias_low, use, CONTINUED)
            f_high, w_high = gates(gate[1].to(tl.float32) + bias_high, use, CONTINUED)
            v_low = f_low * v_low + w_low * value[0].to(tl.float32)
            v_high = f_high * v_high + w_high * value[1].to(tl.float32)
            k_low = f_low * k_low + w_low * key[0].to(tl.float32)
            k_high = f_high * k_high + w_high * key[1].to(tl.float32)
            q_low = query[0].to(tl.float32) * SCORE_SCALE
            q_high = query[1].to(tl.float32) * SCORE_SCALE
            store_halves(value_base + j * D, (v_low, v_high), write, low, high, HALF)
            tl.store(score_base + j, tl.sum(q_low * k_low + q_high * k_high, axis=1), mask=write)
            if n < G:
                if ROPE:
                    q_low, q_high = q_low * cos - q_high * sin, q_high * cos + q_low * sin
                store_halves(query_base + j * (G * H), (q_low, q_high), write, low, high, HALF)
    if CONTINUED:
        is_last = (used > 0) & (start + used - 1 == tl.load(last_indices + row))
        store_halves(last_keys + state_at, (k_low, k_high), is_last, low, high, HALF)
        store_halves(last_values + state_at, (v_low, v_high), is_last, low, high, HALF)
    if ROPE:
        k_low, k_high = k_low * cos - k_high * sin, k_high * cos + k_low * sin
    summary_at = (slot * D)[:, None] + n * H + half[None, :]
    store_halves(summary_keys + summary_at, (k_low, k_high), completes, low, high, HALF)
    store_halves(summary_values + summary_at, (v_low, v_high), completes, low, high, HALF)


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


def forward_launch(shape: RatShape) -> Launch:
    """`rat_recurrence_forward` for these sizes; the inputs are those of the kernel in their order."""
    state = (shape.batch, shape.num_heads, shape.head_dim) if shape.continued else (1, 1, 1)
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
            ("AHEAD", next(n for n in (4, 2, 1) if shape.chunk_size % n == 0)),
            ("NEVER", NEVER),
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
