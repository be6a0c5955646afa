"""The backward recurrence through the chunks of whole rows, whose chunk c is tokens c L to c L + L - 1.

Chunks have nothing to do with each other. One that is longer than a piece is run forward first, and the states before
each of its pieces are kept.
"""

import triton
import triton.language as tl

from pallas_kernels.rat.triton_recurrence_piece import piece_backward, states_after


@triton.jit
def chunks_backward(
    projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights, d_current_scores, d_heads,
    d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
    row, block, slots, tokens, g, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, ROPE: tl.constexpr, CHUNKS: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """CHUNKS chunks of a row, one after the other."""
    D: tl.constexpr = N * H
    for i in range(CHUNKS):
        chunk = block * CHUNKS + i
        if chunk < slots:
            saved_from = saved + (row * slots + chunk) * (PIECES * 4 * D) + channel
            if PIECES > 1:
                for n in range(g, N, G):
                    _save_states(
                        projected, gate_bias, saved_from + n * H, row, chunk, tokens, n, channel,
                        L, N, G, H, PIECE, PIECES,
                    )  # fmt: skip
                tl.debug_barrier()
            for back in range(PIECES):
                piece_backward(
                    projected, gate_bias, cosines, sines, positions, chunk_starts, current_weights,
                    d_current_scores, d_heads, d_rotated_queries, d_summary_keys, d_summary_values, d_projected,
                    saved_from, bias_to, row, chunk, PIECES - 1 - back, (i == 0) & (back == 0),
                    False, tokens, g, channel, L, N, G, H, ROPE, False, PIECE, PIECES,
                )  # fmt: skip


@triton.jit
def _save_states(
    projected, gate_bias, saved_to, row, chunk, tokens, n, channel,
    L: tl.constexpr, N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr,
):  # fmt: skip
    """Runs the recurrence of one head and stores the states before every piece of the chunk but the first."""
    D: tl.constexpr = N * H
    in_head = channel < H
    bias = tl.load(gate_bias + n * H + channel, mask=in_head, other=0.0)
    v_state = tl.zeros_like(bias)
    k_state = tl.zeros_like(bias)
    for piece in range(PIECES - 1):
        places = 0, 0, 0, 0
        v_state, k_state = states_after(
            projected, bias, v_state, k_state, places, row, chunk, piece, tokens, n, channel, L, N, G, H, False, PIECE
        )
        to = saved_to + (piece + 1) * (4 * D)
        tl.store(to, v_state, mask=in_head)
        tl.store(to + D, k_state, mask=in_head)
