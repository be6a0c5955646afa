"""The backward pass of the gated recurrence inside chunks.

With dv~, dk~ the gradients that reach the states of one head from everything but the recurrence, from the chunk's end on:

    DV_t = dv~_t + f_{t+1} DV_{t+1}        dv_t = (1 - f_t) DV_t        (keys alike)
    dg_t = dv_t (v~_t - v_t) + dk_t (k~_t - k_t)      because (1 - f) f (v~_{t-1} - v_t) = (1 - f) (v~_t - v_t).

The difference v~_t - v_t is computed as f_t (v~_{t-1} - v_t), which loses nothing where the gate is nearly shut. What
reaches the states: p_t do_t on v~_t and ds_t q_t / sqrt(H) on k~_t from the own pair, and at a chunk's last token the
gradients of its summary. Queries and keys are shared by the heads of a group, so a program holds them all and sums.
"""

import math

import triton
import triton.language as tl

from pallas_kernels.triton.call import Launch
from pallas_kernels.triton.problem import SEGMENT_TOKENS, Problem, cdiv, next_power_of_2
from pallas_kernels.triton.recurrence import gates, size_constants


@triton.jit(do_not_specialize=["tokens"])
def rat_recurrence_backward(
    projected,  # [B, T, 3 D + 2 G H]
    gate_bias,  # [D] float32
    cosines,  # [C, H / 2] float32
    sines,
    positions,  # [B, T] int32; read only if SEGMENTED
    chunk_starts,  # [B, T] int32; read only if SEGMENTED
    own_scores,  # [B, N, T] float32
    lse,  # [B, N, T] float32
    d_own_scores,  # [B, N, T] float32
    d_heads,  # [B, T, N, H]
    d_rotated_queries,  # [B, T, G, H] float32
    d_summary_keys,  # [B, C, N, H] float32, of the rotated keys
    d_summary_values,  # [B, C, N, H] float32
    d_projected,  # [B, T, 3 D + 2 G H]: dv, dg, dq, dk are written, dz stands already
    tokens,  # T
    d_bias,  # [B, blocks of chunks, D] float32: partial sums
    saved,  # [B, C, pieces - 1, 2, D] float32: states before every piece of a chunk but the first
    d_projected_alias,
    L: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    ROPE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    SOFTMAX_SCALE: tl.constexpr,
    CHUNKS: tl.constexpr,  # chunks of a program, one after the other
    HEADS: tl.constexpr,  # heads of a group, padded
    CHANNELS: tl.constexpr,  # channels of a program
    PIECE: tl.constexpr,  # tokens whose states are held in registers
    PIECES: tl.constexpr,
):
    """One program: CHUNKS chunks, the heads of one group, CHANNELS channels of each."""
    D: tl.constexpr = N * H
    BLOCKS: tl.constexpr = (H + CHANNELS - 1) // CHANNELS
    g = tl.program_id(0) // BLOCKS % G
    block = tl.program_id(0) // (BLOCKS * G)
    row = tl.program_id(1).to(tl.int64)
    slots = tl.cdiv(tokens, L)
    channel = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    head = g + G * tl.arange(0, HEADS)
    mask = (head < N)[:, None] & (channel < H)[None, :]
    at = head[:, None] * H + channel[None, :]
    bias = tl.load(gate_bias + at, mask=mask, other=0.0)
    bias_sum = tl.zeros([HEADS, CHANNELS], tl.float32)
    zero = tl.zeros([HEADS, CHANNELS], tl.float32)

    for i in range(CHUNKS):
        chunk = block * CHUNKS + i
        first = chunk * L
        saved_at = saved + ((row * slots + chunk) * (PIECES - 1)) * (2 * D) + at
        saved_mask = mask & (chunk < slots)
        if PIECES > 1:
            v_state, k_state = zero, zero
            for piece in range(PIECES - 1):
                for j in tl.static_range(PIECE):
                    v_state, k_state = _advance(
                        projected, bias, positions, chunk_starts, row, first, piece * PIECE + j, tokens, g, at, channel,
                        mask, v_state, k_state, L, N, G, H, SEGMENTED,
                    )  # fmt: skip
                tl.store(saved_at + piece * (2 * D), v_state, mask=saved_mask)
                tl.store(saved_at + piece * (2 * D) + D, k_state, mask=saved_mask)
            tl.debug_barrier()
        d_v_state, d_k_state = zero, zero
        if not SEGMENTED:
            d_v_state, d_k_state = _summary_gradients(
                d_summary_keys, d_summary_values, cosines, sines, row * slots + chunk, chunk,
                (first + L) <= tokens, at, channel, mask, D, H, ROPE,
            )  # fmt: skip
        for back in range(PIECES):
            piece = PIECES - 1 - back
            v_state, k_state = zero, zero
            if PIECES > 1:
                before = saved_at + (piece - 1) * (2 * D)
                v_state = tl.load(before, mask=saved_mask & (piece > 0), other=0.0)
                k_state = tl.load(before + D, mask=saved_mask & (piece > 0), other=0.0)
            d_v_state, d_k_state, bias_sum = _piece_backward(
                projected, bias, cosines, sines, positions, chunk_starts, own_scores, lse, d_own_scores, d_heads,
                d_rotated_queries, d_summary_keys, d_summary_values, d_projected,
                row, slots, first, piece * PIECE, tokens, g, head, at, channel, mask,
                v_state, k_state, d_v_state, d_k_state, bias_sum,
                L, N, G, H, ROPE, SEGMENTED, SOFTMAX_SCALE, PIECE,
            )  # fmt: skip
    blocks = tl.cdiv(slots, CHUNKS)
    tl.store(d_bias + (row * blocks + block) * D + at, bias_sum, mask=mask)


@triton.jit
def _piece_backward(
    projected, bias, cosines, sines, positions, chunk_starts, own_scores, lse, d_own_scores, d_heads,
    d_rotated_queries, d_summary_keys, d_summary_values, d_projected,
    row, slots, first, offset, tokens, g, head, at, channel, mask,
    v_state, k_state, d_v_state, d_k_state, bias_sum,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SEGMENTED: tl.constexpr,
    SOFTMAX_SCALE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """PIECE tokens of a chunk: forward over their states, which stay in registers, then back."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    in_head = channel < H
    begin = row * tokens + first + offset
    tile_from = projected + begin * WIDTH + at
    shared_from = projected + begin * WIDTH + 3 * D + g * H + channel
    d_heads_from = d_heads + begin * D + at
    scores_from = (row * N + head) * tokens + first + offset
    tile_to = d_projected + begin * WIDTH + at
    shared_to = d_projected + begin * WIDTH + 3 * D + g * H + channel
    dtype = d_projected.dtype.element_ty
    ahead = ()
    for j in tl.static_range(PIECE):
        use, write, starts, position = _flags(positions, chunk_starts, row, first, offset + j, tokens, L, SEGMENTED)
        tile = mask & use
        v = tl.load(tile_from + (j * WIDTH + D), mask=tile, other=0.0)
        gate = tl.load(tile_from + (j * WIDTH + 2 * D), mask=tile, other=0.0)
        do = tl.load(d_heads_from + j * D, mask=tile, other=0.0)
        q = tl.load(shared_from + j * WIDTH, mask=in_head & use, other=0.0)
        k = tl.load(shared_from + (j * WIDTH + G * H), mask=in_head & use, other=0.0)
        ahead = ahead + ((v, gate, do, q, k, use, write, starts, position),)

    kept = ()
    for j in tl.static_range(PIECE):
        v, gate, do, q, k, use, write, starts, position = ahead[j]
        f, w = gates(gate.to(tl.float32) + bias, use)
        if SEGMENTED:
            v_state = tl.where(starts, 0.0, v_state)
            k_state = tl.where(starts, 0.0, k_state)
        v_step = f * (v_state - v.to(tl.float32))
        k_step = f * (k_state - k.to(tl.float32)[None, :])
        v_state = f * v_state + w * v.to(tl.float32)
        k_state = f * k_state + w * k.to(tl.float32)[None, :]
        rows = (head < N) & use
        ds = tl.load(d_own_scores + scores_from + j, mask=rows, other=0.0) * SOFTMAX_SCALE
        own = tl.load(own_scores + scores_from + j, mask=rows, other=-float("inf"))
        p = tl.exp2(own - tl.load(lse + scores_from + j, mask=rows, other=0.0))
        dq = tl.sum(ds[:, None] * k_state, axis=0)
        dq += _rotate_back(
            d_rotated_queries + ((begin + j) * G + g) * H, cosines, sines, position // L, channel, in_head & write, H, ROPE
        )
        tl.store(shared_to + j * WIDTH, dq.to(dtype), mask=in_head & write)
        kept = kept + ((f, w, v_step, k_step, ds, p),)

    for back in tl.static_range(PIECE):
        v, gate, do, q, k, use, write, starts, position = ahead[PIECE - 1 - back]
        f, w, v_step, k_step, ds, p = kept[PIECE - 1 - back]
        d_v_state += p[:, None] * do.to(tl.float32)
        d_k_state += ds[:, None] * q.to(tl.float32)[None, :]
        if SEGMENTED:
            token = first + offset + PIECE - 1 - back
            ends = use & (position % L == L - 1)
            d_v_end, d_k_end = _summary_gradients(
                d_summary_keys, d_summary_values, cosines, sines, row * slots + token // L, position // L,
                ends, at, channel, mask, D, H, ROPE,
            )  # fmt: skip
            d_v_state += d_v_end
            d_k_state += d_k_end
        dv = w * d_v_state
        dk = w * d_k_state
        dg = dv * v_step + dk * k_step
        bias_sum += dg
        to = (PIECE - 1 - back) * WIDTH
        tl.store(tile_to + (to + D), dv.to(dtype), mask=mask & write)
        tl.store(tile_to + (to + 2 * D), dg.to(dtype), mask=mask & write)
        tl.store(shared_to + (to + G * H), tl.sum(dk, axis=0).to(dtype), mask=in_head & write)
        d_v_state = f * d_v_state
        d_k_state = f * d_k_state
        if SEGMENTED:
            d_v_state = tl.where(starts, 0.0, d_v_state)
            d_k_state = tl.where(starts, 0.0, d_k_state)
    return d_v_state, d_k_state, bias_sum


@triton.jit
def _flags(positions, chunk_starts, row, first, step, tokens, L: tl.constexpr, SEGMENTED: tl.constexpr):
    """Of a token: whether it is of this chunk, is written by this program, starts a chunk; its position."""
    token = first + step
    if SEGMENTED:
        in_row = (token < tokens) & (step < 2 * L)
        position = tl.load(positions + row * tokens + token, mask=in_row, other=0)
        chunk_start = tl.load(chunk_starts + row * tokens + token, mask=in_row, other=-1)
        use = (chunk_start >= first) & (chunk_start < first + L)
        write = use | (in_row & (step < L) & (chunk_start < 0))
        return use, write, chunk_start == token, position
    use = (token < tokens) & (step < L)
    return use, use, step == 0, token


@triton.jit
def _advance(
    projected, bias, positions, chunk_starts, row, first, step, tokens, g, at, channel, mask, v_state, k_state,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, SEGMENTED: tl.constexpr,
):  # fmt: skip
    """The states after one more token."""
    D: tl.constexpr = N * H
    use, _write, starts, _position = _flags(positions, chunk_starts, row, first, step, tokens, L, SEGMENTED)
    wide = projected + (row * tokens + first + step) * (3 * D + 2 * G * H)
    v = tl.load(wide + D + at, mask=mask & use, other=0.0).to(tl.float32)
    gate = tl.load(wide + 2 * D + at, mask=mask & use, other=0.0).to(tl.float32)
    k = tl.load(wide + 3 * D + (G + g) * H + channel, mask=(channel < H) & use, other=0.0).to(tl.float32)[None, :]
    f, w = gates(gate + bias, use)
    if SEGMENTED:
        v_state = tl.where(starts, 0.0, v_state)
        k_state = tl.where(starts, 0.0, k_state)
    return f * v_state + w * v, f * k_state + w * k


@triton.jit
def _summary_gradients(
    d_summary_keys, d_summary_values, cosines, sines, slot, angle, ends, at, channel, mask,
    D: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk's summary, the key's rotated back; zero unless `ends`."""
    dv = tl.load(d_summary_values + slot * D + at, mask=mask & ends, other=0.0)
    head_at = d_summary_keys + slot * D + at - channel[None, :]
    return dv, _rotate_back(head_at, cosines, sines, angle, channel[None, :], mask & ends, H, ROPE)


@triton.jit
def _rotate_back(at, cosines, sines, angle, channel, mask, H: tl.constexpr, ROPE: tl.constexpr):
    """x turned by minus the angle of a chunk: the channel pairs (i, i + H / 2)."""
    x = tl.load(at + channel, mask=mask, other=0.0)
    if ROPE:
        HALF: tl.constexpr = H // 2
        is_low = channel < HALF
        partner = tl.load(at + tl.where(is_low, channel + HALF, channel - HALF), mask=mask, other=0.0)
        cos = tl.load(cosines + angle * HALF + channel % HALF, mask=mask, other=1.0)
        sin = tl.load(sines + angle * HALF + channel % HALF, mask=mask, other=0.0)
        x = x * cos + tl.where(is_low, partner, -partner) * sin
    return x


def backward_launch(problem: Problem) -> Launch:
    """`rat_recurrence_backward` for these sizes; the inputs are those of the kernel in their order."""
    p = problem
    heads = next_power_of_2(p.heads_per_group)
    channels, num_warps = backward_blocks(p)
    steps = 2 * p.chunk_size if p.segmented else p.chunk_size
    pieces = cdiv(steps, SEGMENT_TOKENS)
    chunks = min(8, cdiv(64, p.chunk_size), p.slots)
    return Launch(
        kernel=rat_recurrence_backward,
        grid=(cdiv(p.head_dim, channels) * p.num_groups * cdiv(p.slots, chunks), p.batch),
        integers=(p.tokens,),
        outputs=(
            ((p.batch, cdiv(p.slots, chunks), p.width), "float32"),
            ((p.batch, p.slots, max(1, pieces - 1), 2, p.width) if pieces > 1 else (1,), "float32"),
        ),
        constants=(
            *size_constants(p),
            ("SOFTMAX_SCALE", 1 / math.sqrt(p.head_dim)),
            ("CHUNKS", chunks),
            ("HEADS", heads),
            ("CHANNELS", channels),
            ("PIECE", cdiv(steps, pieces)),
            ("PIECES", pieces),
        ),
        num_warps=num_warps,
        num_stages=1,
        overwritten=(13,),
    )


def backward_blocks(p: Problem) -> tuple[int, int]:
    """Channels of a program, and warps that hold two values a thread of each (heads, channels) tile."""
    heads = next_power_of_2(p.heads_per_group)
    channels = min(next_power_of_2(p.head_dim), max(16, 512 // heads))
    return channels, max(1, min(8, heads * channels // 64))
