"""The backward recurrence over packed documents, whose chunks start anywhere: programs take blocks of L tokens.

A chunk that lies over a program's border is walked by both programs: the one of its end runs the recurrence from its
start, and the one of its start sums up what comes from its later tokens, for each head before the piece by piece work.
"""

import triton
import triton.language as tl

from pallas_kernels.rat.triton_recurrence import gates
from pallas_kernels.rat.triton_recurrence_piece import (
    flags,
    piece_backward,
    piece_places,
    piece_summary_gradients,
    states_after,
)


@triton.jit
def blocks_backward(
    projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores, d_heads,
    d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
    row, block, slots, tokens, g, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, CHUNKS: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """CHUNKS blocks of L tokens of a row, last first."""
    D: tl.constexpr = N * H
    begin = block * CHUNKS
    end = tl.minimum(begin + CHUNKS, slots)
    saved_from = saved + (row * slots + begin) * (PIECES * 4 * D) + channel
    last = (end - begin) * PIECES - 1
    for n in range(g, N, G):
        _save_gradients_of_later(
            projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores,
            d_heads, d_summary_keys, d_summary_values, saved_from + n * H + last * (4 * D), row, end, tokens, g, n,
            channel, L, N, G, H, ROPE, PIECE, PIECES,
        )  # fmt: skip
        _save_states(
            projected, gate_bias, chunk_starts, saved_from + n * H, row, begin, end, tokens, n, channel,
            L, N, G, H, PIECE, PIECES,
        )  # fmt: skip
    tl.debug_barrier()
    for back in range(last + 1):
        index = last - back
        piece_backward(
            projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores,
            d_heads, d_rotated_queries, d_summary_keys, d_summary_values, d_projected,
            saved_from + (index - index % PIECES) * (4 * D), bias_to,
            row, begin + index // PIECES, index % PIECES, back == 0, index > 0, tokens, g, channel,
            L, N, G, H, ROPE, True, PIECE, PIECES,
        )  # fmt: skip


@triton.jit
def _save_gradients_of_later(
    projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores, d_heads,
    d_summary_keys, d_summary_values, saved_to, row, end, tokens, g, n, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """DV and DK of one head after the last token before block `end`.

    They are zero unless that block's first token is inside a chunk. Its tokens in the block are walked back then.
    """
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    in_head = channel < H
    bias = tl.load(gate_bias + n * H + channel, mask=in_head, other=0.0)
    d_v_state = tl.zeros_like(bias)
    d_k_state = tl.zeros_like(bias)
    begin = end * L
    chunk_start = tl.load(chunk_starts + row * tokens + begin, mask=begin < tokens, other=-1)
    if (chunk_start >= 0) & (chunk_start < begin):
        most = tl.cdiv(chunk_start + L - begin, PIECE)
        for back in range(most):
            piece = most - 1 - back
            places = piece_places(chunk_starts, row, end, piece, tokens, 0, chunk_start, L, PIECE)
            d_v_end, d_k_end = piece_summary_gradients(
                d_summary_keys, d_summary_values, cosines, sines, positions, places, row, end, piece, tokens,
                n, channel, L, D, H, ROPE, PIECE,
            )  # fmt: skip
            at = row * tokens + begin + piece * PIECE
            ahead = ()
            for j in tl.static_range(PIECE):
                use, _write, _starts = flags(places, end, piece, j, tokens, L, True, PIECE)
                mask = in_head & use
                token = at + j
                scores_at = (row * N + n) * tokens + begin + piece * PIECE + j
                gate = tl.load(projected + token * WIDTH + 2 * D + n * H + channel, mask=mask, other=0.0)
                q = tl.load(projected + token * WIDTH + 3 * D + g * H + channel, mask=mask, other=0.0)
                do = tl.load(d_heads + token * D + n * H + channel, mask=mask, other=0.0)
                ds = tl.load(d_current_scores + scores_at, mask=use, other=0.0)
                p = tl.load(current_weights + scores_at, mask=use, other=0.0)
                ahead = ahead + ((gate, q, do, ds, p, use),)  # noqa: RUF005
            for j in tl.static_range(PIECE - 1, -1, -1):
                gate, q, do, ds, p, use = ahead[j]
                f, _w = gates(gate.to(tl.float32) + bias, use, True)
                ends = places[2] == j
                d_v_state = f * (d_v_state + p * do.to(tl.float32) + tl.where(ends, d_v_end, 0.0))
                d_k_state = f * (d_k_state + ds * q.to(tl.float32) + tl.where(ends, d_k_end, 0.0))
    tl.store(saved_to + 2 * D, d_v_state, mask=in_head)
    tl.store(saved_to + 3 * D, d_k_state, mask=in_head)


@triton.jit
def _save_states(
    projected, gate_bias, chunk_starts, saved_to, row, begin, end, tokens, n, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The states of one head before every piece of the blocks from `begin` to `end`.

    Where the first token is inside a chunk, the recurrence starts with the chunk's tokens in the block before.
    """
    D: tl.constexpr = N * H
    in_head = channel < H
    bias = tl.load(gate_bias + n * H + channel, mask=in_head, other=0.0)
    v_state = tl.zeros_like(bias)
    k_state = tl.zeros_like(bias)
    first_token = begin * L
    chunk_start = tl.load(chunk_starts + row * tokens + first_token)
    first_piece = begin * PIECES
    piece_before = first_piece
    if (chunk_start >= 0) & (chunk_start < first_token):
        piece_before = first_piece - PIECES + (chunk_start - (first_token - L)) // PIECE
    for index in range(piece_before, end * PIECES - 1):
        to = saved_to + (index - first_piece) * (4 * D)
        tl.store(to, v_state, mask=in_head & (index >= first_piece))
        tl.store(to + D, k_state, mask=in_head & (index >= first_piece))
        least = tl.where(index < first_piece, chunk_start, 0)  # other chunks of the block before are left out
        places = piece_places(chunk_starts, row, index // PIECES, index % PIECES, tokens, least, tokens, L, PIECE)
        v_state, k_state = states_after(
            projected, bias, v_state, k_state, places, row, index // PIECES, index % PIECES, tokens, n, channel,
            L, N, G, H, True, PIECE,
        )  # fmt: skip
    to = saved_to + ((end - begin) * PIECES - 1) * (4 * D)
    tl.store(to, v_state, mask=in_head)
    tl.store(to + D, k_state, mask=in_head)
