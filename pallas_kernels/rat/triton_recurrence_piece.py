"""The backward recurrence over a piece of a chunk, as many tokens as have their states in registers."""

import triton
import triton.language as tl

from pallas_kernels.rat.triton_recurrence import gates


@triton.jit
def piece_backward(
    projected, gate_bias, cosines, sines, current_weights, d_current_scores, d_heads,
    d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
    row, start, slot, angle, used, completes, piece, is_first, tokens, g, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SEGMENTED: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """PIECE tokens of a chunk, head by head: forward over their states, which stay in registers, then back."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    in_head = channel < H
    zero = tl.zeros_like(channel.to(tl.float32))
    begin = row * tokens + start + piece * PIECE
    shared_to = d_projected + begin * WIDTH + 3 * D + g * H + channel
    dtype = d_projected.dtype.element_ty
    dq = (zero,) * PIECE
    dk = (zero,) * PIECE
    for n in tl.range(g, N, G, num_stages=2):  # what the next head reads is copied to shared memory ahead of its use
        dq, dk = _head_backward(
            projected, gate_bias, cosines, sines, current_weights, d_current_scores, d_heads,
            d_summary_keys, d_summary_values, d_projected, saved, bias_to, dq, dk,
            row, start, slot, angle, used, completes, piece, is_first, tokens, g, n, channel,
            L, N, G, H, ROPE, SEGMENTED, PIECE, PIECES,
        )  # fmt: skip
    for j in tl.static_range(PIECE):
        step = piece * PIECE + j
        write = in_head & in_use(start, step, used, tokens, L, SEGMENTED)
        turned = angle if SEGMENTED else (start + step) // L
        rotated = _rotate_back(
            d_rotated_queries + ((begin + j) * G + g) * H, cosines, sines, turned, channel, write, H, ROPE
        )
        tl.store(shared_to + j * WIDTH, (dq[j] + rotated).to(dtype), mask=write)
        tl.store(shared_to + (j * WIDTH + G * H), dk[j].to(dtype), mask=write)


@triton.jit
def _head_backward(
    projected, gate_bias, cosines, sines, current_weights, d_current_scores, d_heads,
    d_summary_keys, d_summary_values, d_projected, saved, bias_to, dq, dk,
    row, start, slot, angle, used, completes, piece, is_first, tokens, g, n, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SEGMENTED: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One head of a piece; adds to dq and dk of the group, which are tuples over the piece's tokens."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    IDENTITY: tl.constexpr = L % PIECE != 0  # steps after a chunk's last token must leave its summary's gradients
    in_head = channel < H
    begin = row * tokens + start + piece * PIECE
    head_from = projected + begin * WIDTH + n * H + channel
    shared_from = projected + begin * WIDTH + 3 * D + g * H + channel
    d_heads_from = d_heads + begin * D + n * H + channel
    head_to = d_projected + begin * WIDTH + n * H + channel
    scores_from = (row * N + n) * tokens + start + piece * PIECE
    dtype = d_projected.dtype.element_ty
    bias = tl.load(gate_bias + n * H + channel, mask=in_head, other=0.0)
    d_v_state, d_k_state, v_state, k_state = _states_around(
        d_summary_keys, d_summary_values, cosines, sines, saved + n * H, slot, angle, completes, piece, n, channel,
        N, H, ROPE, PIECES,
    )  # fmt: skip
    kept = ()
    new_dq = ()
    for j in tl.static_range(PIECE):
        use = in_use(start, piece * PIECE + j, used, tokens, L, SEGMENTED)
        v = tl.load(head_from + (j * WIDTH + D), mask=in_head & use, other=0.0).to(tl.float32)
        gate = tl.load(head_from + (j * WIDTH + 2 * D), mask=in_head & use, other=0.0)
        k = tl.load(shared_from + (j * WIDTH + G * H), mask=in_head & use, other=0.0).to(tl.float32)
        f, w = gates(gate.to(tl.float32) + bias, use, IDENTITY)
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
        use = in_use(start, piece * PIECE + (PIECE - 1 - back), used, tokens, L, SEGMENTED)
        do = tl.load(d_heads_from + (PIECE - 1 - back) * D, mask=in_head & use, other=0.0)
        w, v_step, k_step = kept[PIECE - 1 - back]
        q = tl.load(shared_from + (PIECE - 1 - back) * WIDTH, mask=in_head & use, other=0.0)
        ds = tl.load(d_current_scores + scores_from + (PIECE - 1 - back), mask=use, other=0.0)
        p = tl.load(current_weights + scores_from + (PIECE - 1 - back), mask=use, other=0.0)
        d_v_state += p * do.to(tl.float32)
        d_k_state += ds * q.to(tl.float32)
        dv = w * d_v_state
        d_key = w * d_k_state
        dg = dv * v_step + d_key * k_step
        bias_sum += dg
        new_dk = (dk[PIECE - 1 - back] + d_key,) + new_dk  # noqa: RUF005
        to = head_to + (PIECE - 1 - back) * WIDTH
        tl.store(to + D, dv.to(dtype), mask=in_head & use)
        tl.store(to + 2 * D, dg.to(dtype), mask=in_head & use)
        d_v_state -= dv
        d_k_state -= d_key
    if PIECES > 1:
        after = saved + n * H + (piece - 1) * (4 * D) + 2 * D
        tl.store(after, d_v_state, mask=in_head & (piece > 0))
        tl.store(after + D, d_k_state, mask=in_head & (piece > 0))
    so_far = tl.load(bias_to + n * H, mask=in_head & ~is_first, other=0.0)
    tl.store(bias_to + n * H, so_far + bias_sum, mask=in_head)
    return new_dq, new_dk


@triton.jit
def in_use(start, step, used, tokens, L: tl.constexpr, SEGMENTED: tl.constexpr):
    """Whether a step from the start of a chunk is one of its tokens.

    In whole rows it is not asked by `used`: the machine code that follows from that takes nearly twice the time.
    """
    if SEGMENTED:
        return step < used
    return (start + step < tokens) & (step < L)


@triton.jit
def _states_around(
    d_summary_keys, d_summary_values, cosines, sines, saved, slot, angle, completes, piece, n, channel,
    N: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """DV and DK that reach a piece from behind, v~ and k~ before it."""
    D: tl.constexpr = N * H
    ends = completes & (piece == PIECES - 1)
    d_v_state, d_k_state = _summary_gradients(
        d_summary_keys, d_summary_values, cosines, sines, slot, angle, ends, n, channel, D, H, ROPE
    )
    v_state = tl.zeros_like(d_v_state)
    k_state = tl.zeros_like(d_v_state)
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
