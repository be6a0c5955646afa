"""The backward recurrence over a piece of a chunk, as many tokens as have their states in registers.

In whole rows a piece is one of a chunk, over packed documents (SEGMENTED) one of a block of L tokens, in which chunks
start and end anywhere.
"""

import triton
import triton.language as tl

from pallas_kernels.rat.triton_recurrence import gates


@triton.jit
def piece_backward(
    projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores, d_heads,
    d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
    row, chunk, piece, is_first, has_before, tokens, g, channel,
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
    places = 0, 0, 0, 0
    if SEGMENTED:
        places = piece_places(chunk_starts, row, chunk, piece, tokens, 0, tokens, L, PIECE)
    dq = (zero,) * PIECE
    dk = (zero,) * PIECE
    for n in range(g, N, G):
        dq, dk = _head_backward(
            projected, gate_bias, cosines, sines, positions, current_weights, d_current_scores, d_heads,
            d_summary_keys, d_summary_values, d_projected, saved, bias_to, dq, dk, places,
            row, chunk, piece, is_first, has_before, tokens, g, n, channel, L, N, G, H, ROPE, SEGMENTED, PIECE, PIECES,
        )  # fmt: skip
    for j in tl.static_range(PIECE):
        use, write, _starts = flags(places, chunk, piece, j, tokens, L, SEGMENTED, PIECE)
        position = chunk * L + (piece * PIECE + j)
        if SEGMENTED:
            position = tl.load(positions + begin + j, mask=use, other=0)
        rotated = _rotate_back(
            d_rotated_queries + ((begin + j) * G + g) * H,
            cosines,
            sines,
            position // L,
            channel,
            in_head & use,
            H,
            ROPE,
        )
        tl.store(shared_to + j * WIDTH, (dq[j] + rotated).to(dtype), mask=in_head & write)
        tl.store(shared_to + (j * WIDTH + G * H), dk[j].to(dtype), mask=in_head & write)


@triton.jit
def _head_backward(
    projected, gate_bias, cosines, sines, positions, current_weights, d_current_scores, d_heads,
    d_summary_keys, d_summary_values, d_projected, saved, bias_to, dq, dk, places,
    row, chunk, piece, is_first, has_before, tokens, g, n, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SEGMENTED: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One head of a piece; adds to dq and dk of the group, which are tuples over the piece's tokens."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    IDENTITY: tl.constexpr = SEGMENTED or L % PIECE != 0  # some steps must leave the state as it is
    in_head = channel < H
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
        use, write, starts = flags(places, chunk, piece, j, tokens, L, SEGMENTED, PIECE)
        mask = in_head & use
        v = tl.load(head_from + (j * WIDTH + D), mask=mask, other=0.0)
        gate = tl.load(head_from + (j * WIDTH + 2 * D), mask=mask, other=0.0)
        do = tl.load(d_heads_from + j * D, mask=mask, other=0.0)
        ahead = ahead + ((v, gate, do, use, write, starts),)  # noqa: RUF005

    kept = ()
    new_dq = ()
    for j in tl.static_range(PIECE):
        v, gate, do, use, write, starts = ahead[j]
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
    if SEGMENTED:
        d_v_end, d_k_end = piece_summary_gradients(
            d_summary_keys, d_summary_values, cosines, sines, positions, places, row, chunk, piece, tokens,
            n, channel, L, D, H, ROPE, PIECE,
        )  # fmt: skip
    for back in tl.static_range(PIECE):
        v, gate, do, use, write, starts = ahead[PIECE - 1 - back]
        w, v_step, k_step = kept[PIECE - 1 - back]
        q = tl.load(shared_from + (PIECE - 1 - back) * WIDTH, mask=in_head & use, other=0.0)
        ds = tl.load(d_current_scores + scores_from + (PIECE - 1 - back), mask=use, other=0.0)
        p = tl.load(current_weights + scores_from + (PIECE - 1 - back), mask=use, other=0.0)
        d_v_state += p * do.to(tl.float32)
        d_k_state += ds * q.to(tl.float32)
        if SEGMENTED:
            ends = places[2] == PIECE - 1 - back
            d_v_state += tl.where(ends, d_v_end, 0.0)
            d_k_state += tl.where(ends, d_k_end, 0.0)
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
    if not SEGMENTED:
        has_before = piece > 0
    if SEGMENTED or PIECES > 1:
        after = saved + n * H + (piece - 1) * (4 * D) + 2 * D
        tl.store(after, d_v_state, mask=in_head & has_before)
        tl.store(after + D, d_k_state, mask=in_head & has_before)
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
    if SEGMENTED:
        at = saved + piece * (4 * D)
        v_state = tl.load(at, mask=channel < H, other=0.0)
        k_state = tl.load(at + D, mask=channel < H, other=0.0)
        d_v_state = tl.load(at + 2 * D, mask=channel < H, other=0.0)
        d_k_state = tl.load(at + 3 * D, mask=channel < H, other=0.0)
    elif PIECES > 1:
        at = saved + piece * (4 * D)
        before = (channel < H) & (piece > 0)
        after = (channel < H) & (piece < PIECES - 1)
        v_state = tl.load(at, mask=before, other=0.0)
        k_state = tl.load(at + D, mask=before, other=0.0)
        d_v_state += tl.load(at + 2 * D, mask=after, other=0.0)
        d_k_state += tl.load(at + 3 * D, mask=after, other=0.0)
    return d_v_state, d_k_state, v_state, k_state


@triton.jit
def states_after(
    projected, bias, v_state, k_state, places, row, chunk, piece, tokens, n, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, SEGMENTED: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """The states of one head after a piece."""
    D: tl.constexpr = N * H
    in_head = channel < H
    for j in tl.static_range(PIECE):
        step = piece * PIECE + j
        use, _write, starts = flags(places, chunk, piece, j, tokens, L, SEGMENTED, PIECE)
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
    return v_state, k_state


@triton.jit
def piece_places(chunk_starts, row, chunk, piece, tokens, least, most, L: tl.constexpr, PIECE: tl.constexpr):
    """Of the PIECE tokens of a block of L: bits of those in use, of those that start a chunk, the offset of the one
    that completes one (PIECE if none does: there is at most one), how many are of the block and in the row.

    In use are tokens whose chunk started at `least`, `most` or between.
    """
    j = tl.arange(0, 32)
    begin = chunk * L + piece * PIECE
    count = tl.minimum(tl.minimum(PIECE, L - piece * PIECE), tokens - begin)
    chunk_start = tl.load(chunk_starts + row * tokens + begin + j, mask=j < count, other=-1)
    use = (chunk_start >= least) & (chunk_start <= most)
    since = begin + j - chunk_start
    uses = tl.sum(tl.where(use, 1 << j, 0))
    starts = tl.sum(tl.where(use & (since == 0), 1 << j, 0))
    end = tl.min(tl.where(use & (since == L - 1), j, PIECE))
    return uses, starts, end, count


@triton.jit
def flags(places, chunk, piece, j, tokens, L: tl.constexpr, SEGMENTED: tl.constexpr, PIECE: tl.constexpr):
    """Of a token: whether it takes part, is written by this program, starts a chunk."""
    if SEGMENTED:
        uses, starts, _end, count = places
        return (uses & (1 << j)) != 0, j < count, (starts & (1 << j)) != 0
    step = piece * PIECE + j
    token = chunk * L + step
    use = (token < tokens) & (step < L)
    return use, use, step == 0


@triton.jit
def piece_summary_gradients(
    d_summary_keys, d_summary_values, cosines, sines, positions, places, row, chunk, piece, tokens, n, channel,
    L: tl.constexpr, D: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Those of the chunk that a token of the piece completes, if one does."""
    end = places[2]
    ends = end < PIECE
    position = tl.load(positions + row * tokens + chunk * L + piece * PIECE + end, mask=ends, other=0)
    slot = row * tl.cdiv(tokens, L) + chunk
    return _summary_gradients(
        d_summary_keys, d_summary_values, cosines, sines, slot, position // L, ends, n, channel, D, H, ROPE
    )


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
