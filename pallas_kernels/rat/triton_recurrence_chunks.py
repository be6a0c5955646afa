"""The backward recurrence through the chunks of a program, of whole rows or of packed documents.

Chunks have nothing to do with each other. One that is longer than a piece is run forward first, and the states before
each of its pieces are kept.
"""

import triton
import triton.language as tl

from pallas_kernels.rat.triton_chunk_runs import first_of_block
from pallas_kernels.rat.triton_recurrence import gates
from pallas_kernels.rat.triton_recurrence_piece import in_use, piece_backward


@triton.jit
def chunks_backward(
    projected, gate_bias, cosines, sines, positions, runs, current_weights, d_current_scores, d_heads,
    d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
    row, block, tokens, g, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SEGMENTED: tl.constexpr,
    CHUNKS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """The chunks that start in CHUNKS blocks of L tokens of a row, one after the other."""
    slots = tl.cdiv(tokens, L)
    if SEGMENTED:
        start = first_of_block(runs, row, block * CHUNKS, tokens, L)
        end = first_of_block(runs, row, block * CHUNKS + CHUNKS, tokens, L)
        for n in range(g, N, G):  # there may be no chunk
            tl.store(bias_to + n * H, tl.zeros_like(channel.to(tl.float32)), mask=channel < H)
        while start < end:
            chunk = start // L
            length = tl.load(runs + row * tokens + start)
            position = tl.load(positions + row * tokens + start)
            used = tl.where(position < 0, 0, length)
            pieces = tl.where(position < 0, 0, PIECES)
            slot = row * slots + (start + L - 1) // L
            if position < 0:
                _clear(d_projected, row * tokens + start, length, g, channel, N, G, H)
            _chunk_backward(
                projected, gate_bias, cosines, sines, current_weights, d_current_scores, d_heads,
                d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
                row, chunk, start, slot, position // L, used, used == L, pieces, False, tokens, g, channel,
                L, N, G, H, ROPE, True, PIECE, PIECES,
            )  # fmt: skip
            start += length
    else:
        for i in range(CHUNKS):
            chunk = block * CHUNKS + i
            if chunk < slots:
                start = chunk * L
                _chunk_backward(
                    projected, gate_bias, cosines, sines, current_weights, d_current_scores, d_heads,
                    d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
                    row, chunk, start, row * slots + chunk, chunk, L, start + L <= tokens, PIECES, i == 0, tokens, g,
                    channel, L, N, G, H, ROPE, False, PIECE, PIECES,
                )  # fmt: skip


@triton.jit
def _chunk_backward(
    projected, gate_bias, cosines, sines, current_weights, d_current_scores, d_heads,
    d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
    row, chunk, start, slot, angle, used, completes, pieces, is_first, tokens, g, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, SEGMENTED: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """One chunk: the states before its pieces, then its pieces, the last one first."""
    saved_from = saved + (row * tl.cdiv(tokens, L) + chunk) * (PIECES * 4 * N * H) + channel
    if PIECES > 1:
        for n in range(g, N, G):
            _save_states(
                projected, gate_bias, saved_from + n * H, row, start, used, tokens, n, channel,
                L, N, G, H, SEGMENTED, PIECE, PIECES,
            )  # fmt: skip
        tl.debug_barrier()
    for back in range(pieces):
        piece_backward(
            projected, gate_bias, cosines, sines, current_weights, d_current_scores, d_heads,
            d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved_from, bias_to,
            row, start, slot, angle, used, completes, PIECES - 1 - back, is_first & (back == 0),
            tokens, g, channel, L, N, G, H, ROPE, SEGMENTED, PIECE, PIECES,
        )  # fmt: skip


@triton.jit
def _clear(to, first, count, g, channel, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr):
    """Zeros in the gradients of padding, from a token on."""
    WIDTH: tl.constexpr = 3 * N * H + 2 * G * H
    zero = tl.zeros_like(channel.to(tl.float32)).to(to.dtype.element_ty)
    for j in range(count):
        at = to + (first + j) * WIDTH + channel
        for n in range(g, N, G):
            tl.store(at + (N + n) * H, zero, mask=channel < H)
            tl.store(at + (2 * N + n) * H, zero, mask=channel < H)
        tl.store(at + (3 * N + g) * H, zero, mask=channel < H)
        tl.store(at + (3 * N + G + g) * H, zero, mask=channel < H)


@triton.jit
def _save_states(
    projected, gate_bias, saved_to, row, start, used, tokens, n, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, SEGMENTED: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Runs the recurrence of one head and stores the states before every piece of the chunk but the first."""
    D: tl.constexpr = N * H
    WIDTH: tl.constexpr = 3 * D + 2 * G * H
    in_head = channel < H
    bias = tl.load(gate_bias + n * H + channel, mask=in_head, other=0.0)
    v_state = tl.zeros_like(bias)
    k_state = tl.zeros_like(bias)
    for piece in range(PIECES - 1):
        for j in tl.static_range(PIECE):
            step = piece * PIECE + j
            mask = in_head & in_use(start, step, used, tokens, L, SEGMENTED)
            at = projected + (row * tokens + start + step) * WIDTH + channel
            v = tl.load(at + D + n * H, mask=mask, other=0.0).to(tl.float32)
            gate = tl.load(at + 2 * D + n * H, mask=mask, other=0.0).to(tl.float32)
            k = tl.load(at + 3 * D + (G + n % G) * H, mask=mask, other=0.0).to(tl.float32)
            f, w = gates(gate + bias, True, False)
            v_state = f * v_state + w * v
            k_state = f * k_state + w * k
        to = saved_to + (piece + 1) * (4 * D)
        tl.store(to, v_state, mask=in_head)
        tl.store(to + D, k_state, mask=in_head)
