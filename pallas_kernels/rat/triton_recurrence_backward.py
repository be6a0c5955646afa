"""The backward pass of the gated recurrence inside chunks.

With dv~, dk~ the gradients that reach one head's states from everything but the recurrence, from the chunk's end on:

    DV_t = dv~_t + f_{t+1} DV_{t+1}        dv_t = (1 - f_t) DV_t        (keys alike)
    dg_t = dv_t (v~_t - v_t) + dk_t (k~_t - k_t)      because (1 - f) f (v~_{t-1} - v_t) = (1 - f) (v~_t - v_t).

The difference v~_t - v_t is computed as f_t (v~_{t-1} - v_t), which loses nothing where the gate is nearly shut. What
reaches the states: p_t do_t on v~_t and ds_t q_t / sqrt(H) on k~_t from the current pair, and at a chunk's last token
the gradients of its summary. Queries and keys are shared by the heads of a group, so a program sums over these.
"""

import triton
import triton.language as tl

from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import Launch
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.triton_recurrence import gates, size_constants
from pallas_kernels.rat.triton_tiling import PIECE_TOKENS


@triton.jit(do_not_specialize=["tokens"])
def rat_recurrence_backward(
    projected,  # [B, T, 3 D + 2 G H]
    gate_bias,  # [D] float32
    cosines,  # [C, H / 2] float32
    sines,
    positions,  # [B, T] int32; read only if SEGMENTED
    chunk_starts,  # [B, T] int32; read only if SEGMENTED
    current_weights,  # [B, N, T] float32: p
    d_current_scores,  # [B, N, T] float32: ds, times 1 / sqrt(H)
    d_heads,  # [B, T, N, H]
    d_rotated_queries,  # [B, T, G, H] float32
    d_summary_keys,  # [B, C, N, H] float32, of the rotated keys
    d_summary_values,  # [B, C, N, H] float32
    d_projected,  # [B, T, 3 D + 2 G H]: dv, dg, dq, dk are written, dz is there already
    tokens,  # T
    d_bias,  # [B, blocks of chunks, D] float32: partial sums
    saved,  # [B, C, PIECES, 4, D] float32: v~, k~ before a piece, DV, DK after it; not used if PIECES is 1
    d_projected_alias,
    L: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    ROPE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    CHUNKS: tl.constexpr,  # chunks of a program, one after the other
    CHANNELS: tl.constexpr,  # channels of a program
    PIECE: tl.constexpr,  # tokens whose states are held in registers
    PIECES: tl.constexpr,
):
    """One program: CHUNKS chunks, CHANNELS channels of a group, its heads one after the other, usually one warp.

    A token's tile is a vector of channels, so that nothing is exchanged between threads; the sums over heads stay in
    registers for a piece of a chunk.
    """
    D: tl.constexpr = N * H
    BLOCKS: tl.constexpr = (H + CHANNELS - 1) // CHANNELS
    g = tl.program_id(0) // BLOCKS % G
    block = tl.program_id(0) // (BLOCKS * G)
    row = tl.program_id(1).to(tl.int64)
    slots = tl.cdiv(tokens, L)
    channel = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    bias_to = d_bias + (row * tl.cdiv(slots, CHUNKS) + block) * D + channel
    for i in range(CHUNKS):
        chunk = block * CHUNKS + i
        if chunk < slots:
            saved_from = saved + (row * slots + chunk) * (PIECES * 4 * D) + channel
            if PIECES > 1:
                for n in range(g, N, G):
                    _save_states(
                        projected, gate_bias, positions, chunk_starts, saved_from + n * H, row, chunk, tokens, n,
                        channel, L, N, G, H, SEGMENTED, PIECE, PIECES,
                    )  # fmt: skip
                tl.debug_barrier()
            for back in range(PIECES):
                _piece_backward(
                    projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores,
                    d_heads, d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved_from, bias_to,
                    row, chunk, PIECES - 1 - back, (i == 0) & (back == 0), tokens, g, channel,
                    L, N, G, H, ROPE, SEGMENTED, PIECE, PIECES,
                )  # fmt: skip


@triton.jit
def _save_states(
    projected, gate_bias, positions, chunk_starts, saved_to, row, chunk, tokens, n, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, SEGMENTED: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Runs the recurrence of one head and stores the states before every piece of the chunk."""
    D: tl.constexpr = N * H
    in_head = channel < H
    bias = tl.load(gate_bias + n * H + channel, mask=in_head, other=0.0)
    v_state = tl.zeros_like(bias)
    k_state = tl.zeros_like(bias)
    for piece in range(PIECES - 1):
        for j in tl.static_range(PIECE):
            step = piece * PIECE + j
            use, _write, starts, _position = _flags(positions, chunk_starts, row, chunk, step, tokens, L, SEGMENTED)
            at = projected + (row * tokens + chunk * L + step) * (3 * D + 2 * G * H) + channel
            v = tl.load(at + D + n * H, mask=in_head & use, other=0.0).to(tl.float32)
            gate = tl.load(at + 2 * D + n * H, mask=in_head & use, other=0.0).to(tl.float32)
            k = tl.load(at + 3 * D + (G + n % G) * H, mask=in_head & use, other=0.0).to(tl.float32)
            f, w = gates(gate + bias, use, SEGMENTED)
            if SEGMENTED:
                v_state = tl.where(starts, 0.0, v_state)
                k_state = tl.where(starts, 0.0, k_state)
            v_state = f * v_state + w * v
            k_state = f * k_state + w * k
        to = saved_to + (piece + 1) * (4 * D)
        tl.store(to, v_state, mask=in_head)
        tl.store(to + D, k_state, mask=in_head)


@triton.jit
def _piece_backward(
    projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores, d_heads,
    d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
    row, chunk, piece, is_first, tokens, g, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SEGMENTED: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """PIECE tokens of a chunk, head by head: forward over their states, which stay in registers, then back."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    in_head = channel < H
    zero = tl.zeros_like(channel.to(tl.float32))
    begin = row * tokens + chunk * L + piece * PIECE
    shared_to = d_projected + begin * WIDTH + 3 * D + g * H + channel
    dtype = d_projected.dtype.element_ty
    dq = (zero,) * PIECE
    dk = (zero,) * PIECE
    for n in range(g, N, G):
        dq, dk = _head_backward(
            projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores, d_heads,
            d_summary_keys, d_summary_values, d_projected, saved, bias_to, dq, dk,
            row, chunk, piece, is_first, tokens, g, n, channel, L, N, G, H, ROPE, SEGMENTED, PIECE, PIECES,
        )  # fmt: skip
    for j in tl.static_range(PIECE):
        _use, write, _starts, position = _flags(
            positions, chunk_starts, row, chunk, piece * PIECE + j, tokens, L, SEGMENTED
        )
        rotated = _rotate_back(
            d_rotated_queries + ((begin + j) * G + g) * H,
            cosines,
            sines,
            position // L,
            channel,
            in_head & write,
            H,
            ROPE,
        )
        tl.store(shared_to + j * WIDTH, (dq[j] + rotated).to(dtype), mask=in_head & write)
        tl.store(shared_to + (j * WIDTH + G * H), dk[j].to(dtype), mask=in_head & write)


@triton.jit
def _head_backward(
    projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores, d_heads,
    d_summary_keys, d_summary_values, d_projected, saved, bias_to, dq, dk,
    row, chunk, piece, is_first, tokens, g, n, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SEGMENTED: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One head of a piece; adds to dq and dk of the group, which are tuples over the piece's tokens."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    IDENTITY: tl.constexpr = SEGMENTED or L % PIECE != 0  # some steps must leave the state as it is
    in_head = channel < H
    slots = tl.cdiv(tokens, L)
    begin = row * tokens + chunk * L + piece * PIECE
    head_from = projected + begin * WIDTH + n * H + channel
    shared_from = projected + begin * WIDTH + 3 * D + g * H + channel
    d_heads_from = d_heads + begin * D + n * H + channel
    head_to = d_projected + begin * WIDTH + n * H + channel
    scores_from = (row * N + n) * tokens + chunk * L + piece * PIECE
    dtype = d_projected.dtype.element_ty
    bias = tl.load(gate_bias + n * H + channel, mask=in_head, other=0.0)
    d_v_state, d_k_state, v_state, k_state = _states_around(
        d_summary_keys, d_summary_values, cosines, sines, saved + n * H, row, chunk, piece, tokens, n, channel,
        L, N, H, ROPE, SEGMENTED, PIECES,
    )  # fmt: skip
    ahead = ()
    for j in tl.static_range(PIECE):
        use, write, starts, position = _flags(
            positions, chunk_starts, row, chunk, piece * PIECE + j, tokens, L, SEGMENTED
        )
        mask = in_head & use
        v = tl.load(head_from + (j * WIDTH + D), mask=mask, other=0.0)
        gate = tl.load(head_from + (j * WIDTH + 2 * D), mask=mask, other=0.0)
        do = tl.load(d_heads_from + j * D, mask=mask, other=0.0)
        ahead = ahead + ((v, gate, do, use, write, starts, position),)  # noqa: RUF005

    kept = ()
    new_dq = ()
    for j in tl.static_range(PIECE):
        v, gate, do, use, write, starts, position = ahead[j]
        v = v.to(tl.float32)
        k = tl.load(shared_from + (j * WIDTH + G * H), mask=in_head & use, other=0.0).to(tl.float32)
        f, w = gates(gate.to(tl.float32) + bias, use, IDENTITY)
        if SEGMENTED:
            v_state = tl.where(starts, 0.0, v_state)
            k_state = tl.where(starts, 0.0, k_state)
        v_step = f * (v_state - v)
        k_step = f * (k_state - k)
        v_state = f * v_state + w * v
        k_state = f * k_state + w * k
        ds = tl.load(d_current_scores + scores_from + j, mask=use, other=0.0)
        new_dq = new_dq + (dq[j] + ds * k_state,)  # noqa: RUF005
        kept = kept + ((w, v_step, k_step),)  # noqa: RUF005

    bias_sum = tl.zeros_like(bias)
    new_dk = ()
    for back in tl.static_range(PIECE):
        v, gate, do, use, write, starts, position = ahead[PIECE - 1 - back]
        w, v_step, k_step = kept[PIECE - 1 - back]
        q = tl.load(shared_from + (PIECE - 1 - back) * WIDTH, mask=in_head & use, other=0.0)
        ds = tl.load(d_current_scores + scores_from + (PIECE - 1 - back), mask=use, other=0.0)
        p = tl.load(current_weights + scores_from + (PIECE - 1 - back), mask=use, other=0.0)
        d_v_state += p * do.to(tl.float32)
        d_k_state += ds * q.to(tl.float32)
        if SEGMENTED:
            ends = use & (position % L == L - 1)
            slot = row * slots + (chunk * L + piece * PIECE + PIECE - 1 - back) // L
            d_v_end, d_k_end = _summary_gradients(
                d_summary_keys, d_summary_values, cosines, sines, slot, position // L, ends, n, channel, D, H, ROPE
            )
            d_v_state += d_v_end
            d_k_state += d_k_end
        dv = w * d_v_state
        d_key = w * d_k_state
        dg = dv * v_step + d_key * k_step
        bias_sum += dg
        new_dk = (dk[PIECE - 1 - back] + d_key,) + new_dk  # noqa: RUF005
        to = head_to + (PIECE - 1 - back) * WIDTH
        tl.store(to + D, dv.to(dtype), mask=in_head & write)
        tl.store(to + 2 * D, dg.to(dtype), mask=in_head & write)
        d_v_state -= dv
        d_k_state -= d_key
        if SEGMENTED:
            d_v_state = tl.where(starts, 0.0, d_v_state)
            d_k_state = tl.where(starts, 0.0, d_k_state)
    if PIECES > 1:
        after = saved + n * H + (piece - 1) * (4 * D) + 2 * D
        tl.store(after, d_v_state, mask=in_head & (piece > 0))
        tl.store(after + D, d_k_state, mask=in_head & (piece > 0))
    so_far = tl.load(bias_to + n * H, mask=in_head & ~is_first, other=0.0)
    tl.store(bias_to + n * H, so_far + bias_sum, mask=in_head)
    return new_dq, new_dk


@triton.jit
def _states_around(
    d_summary_keys, d_summary_values, cosines, sines, saved, row, chunk, piece, tokens, n, channel,
    L: tl.constexpr, N: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SEGMENTED: tl.constexpr,
    PIECES: tl.constexpr,
):  # fmt: skip
    """DV and DK that reach a piece from behind, v~ and k~ before it."""
    D: tl.constexpr = N * H
    d_v_state = tl.zeros_like(channel.to(tl.float32))
    d_k_state = tl.zeros_like(d_v_state)
    v_state = tl.zeros_like(d_v_state)
    k_state = tl.zeros_like(d_v_state)
    if not SEGMENTED:
        slot = row * tl.cdiv(tokens, L) + chunk
        ends = (chunk * L + L <= tokens) & (piece == PIECES - 1)
        d_v_state, d_k_state = _summary_gradients(
            d_summary_keys, d_summary_values, cosines, sines, slot, chunk, ends, n, channel, D, H, ROPE
        )
    if PIECES > 1:
        at = saved + piece * (4 * D)
        before = (channel < H) & (piece > 0)
        after = (channel < H) & (piece < PIECES - 1)
        v_state = tl.load(at, mask=before, other=0.0)
        k_state = tl.load(at + D, mask=before, other=0.0)
        d_v_state += tl.load(at + 2 * D, mask=after, other=0.0)
        d_k_state += tl.load(at + 3 * D, mask=after, other=0.0)
    return d_v_state, d_k_state, v_state, k_state


@triton.jit
def _flags(positions, chunk_starts, row, chunk, step, tokens, L: tl.constexpr, SEGMENTED: tl.constexpr):
    """Of a token: whether it is of this chunk, is written by this program, starts a chunk; its position."""
    token = chunk * L + step
    if SEGMENTED:
        in_row = (token < tokens) & (step < 2 * L)
        position = tl.load(positions + row * tokens + token, mask=in_row, other=0)
        chunk_start = tl.load(chunk_starts + row * tokens + token, mask=in_row, other=-1)
        use = (chunk_start >= chunk * L) & (chunk_start < chunk * L + L)
        write = use | (in_row & (step < L) & (chunk_start < 0))
        return use, write, chunk_start == token, position
    use = (token < tokens) & (step < L)
    return use, use, step == 0, token


@triton.jit
def _summary_gradients(
    d_summary_keys, d_summary_values, cosines, sines, slot, angle, ends, n, channel,
    D: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    """The gradients of one chunk's summary, the key's rotated back; zero unless `ends`."""
    mask = (channel < H) & ends
    dv = tl.load(d_summary_values + slot * D + n * H + channel, mask=mask, other=0.0)
    return dv, _rotate_back(d_summary_keys + slot * D + n * H, cosines, sines, angle, channel, mask, H, ROPE)


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


def backward_launch(shape: RatShape) -> Launch:
    """`rat_recurrence_backward` for these sizes; the inputs are those of the kernel in their order."""
    channels = min(64, next_power_of_2(shape.head_dim))
    steps = 2 * shape.chunk_size if shape.segmented else shape.chunk_size
    pieces = cdiv(steps, PIECE_TOKENS)
    chunks = min(8, cdiv(128, shape.chunk_size), shape.num_chunks)
    return Launch(
        kernel=rat_recurrence_backward,
        grid=(cdiv(shape.head_dim, channels) * shape.num_groups * cdiv(shape.num_chunks, chunks), shape.batch),
        integers=(shape.tokens,),
        outputs=(
            ((shape.batch, cdiv(shape.num_chunks, chunks), shape.width), "float32"),
            ((shape.batch, shape.num_chunks, pieces, 4, shape.width) if pieces > 1 else (1,), "float32"),
        ),
        constants=(
            *size_constants(shape),
            ("CHUNKS", chunks),
            ("CHANNELS", channels),
            ("PIECE", cdiv(steps, pieces)),
            ("PIECES", pieces),
        ),
        num_warps=1,
        num_stages=1,
        overwritten=(12,),
    )
