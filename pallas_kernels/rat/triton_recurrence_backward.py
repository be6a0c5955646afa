"""The backward pass of the gated recurrence inside chunks.

With dv~, dk~ the gradients that reach one head's states from everything but the recurrence, from the chunk's end on:

    DV_t = dv~_t + f_{t+1} DV_{t+1}        dv_t = (1 - f_t) DV_t        (keys alike)
    dg_t = dv_t (v~_t - v_t) + dk_t (k~_t - k_t)      because (1 - f) f (v~_{t-1} - v_t) = (1 - f) (v~_t - v_t).

The difference v~_t - v_t is computed as f_t (v~_{t-1} - v_t), which loses nothing where the gate is nearly shut. What
reaches the states: p_t do_t on v~_t and ds_t q_t / sqrt(H) on k~_t from the current pair, and at a chunk's last token
the gradients of its summary. Queries and keys are shared by the heads of a group, so a program sums over these.

A program goes through the chunks that start in some blocks of L tokens (`triton_recurrence_chunks`), in pieces
(`triton_recurrence_piece`), of which the last comes first.
"""

import triton
import triton.language as tl

from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import Launch
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.triton_recurrence import size_constants
from pallas_kernels.rat.triton_recurrence_chunks import chunks_backward
from pallas_kernels.rat.triton_tiling import PIECE_TOKENS

PROGRAM_TOKENS = 128  # of a program, about


@triton.jit(do_not_specialize=["tokens"])
def rat_recurrence_backward(
    projected,  # [B, T, 3 D + 2 G H]
    gate_bias,  # [D] float32
    cosines,  # [C, H / 2] float32
    sines,
    positions,  # [B, T] int32, -1 outside of chunks; read only if SEGMENTED
    runs,  # [B, T] int32, of `triton_chunk_runs.chunk_runs`; read only if SEGMENTED
    current_weights,  # [B, N, T] float32: p
    d_current_scores,  # [B, N, T] float32: ds, times 1 / sqrt(H)
    d_heads,  # [B, T, N, H]
    d_rotated_queries,  # [B, T, G, H] float32
    d_summary_keys,  # [B, C, N, H] float32, of the rotated keys
    d_summary_values,  # [B, C, N, H] float32
    d_projected,  # [B, T, 3 D + 2 G H]: dv, dg, dq, dk are written, dz is there already
    tokens,  # T
    d_bias,  # [B, programs of a row, D] float32: partial sums
    saved,  # [B, C, PIECES, 4, D] float32: v~, k~ before a piece, DV, DK after it; used if PIECES is above 1
    d_projected_alias,
    L: tl.constexpr,
    N: tl.constexpr,
    G: tl.constexpr,
    H: tl.constexpr,
    ROPE: tl.constexpr,
    SEGMENTED: tl.constexpr,
    CHUNKS: tl.constexpr,  # blocks of L tokens, whose chunks a program takes one after the other
    CHANNELS: tl.constexpr,  # channels of a program
    PIECE: tl.constexpr,  # tokens whose states are held in registers
    PIECES: tl.constexpr,
):
    """One program: the chunks of CHUNKS blocks, CHANNELS channels of a group, its heads one after the other.

    A token's tile is a vector of channels, so that nothing is exchanged between threads, usually of one warp; the sums
    over heads stay in registers for a piece of a chunk.
    """
    D: tl.constexpr = N * H
    BLOCKS: tl.constexpr = (H + CHANNELS - 1) // CHANNELS
    g = tl.program_id(0) // BLOCKS % G
    block = tl.program_id(0) // (BLOCKS * G)
    row = tl.program_id(1).to(tl.int64)
    channel = tl.program_id(0) % BLOCKS * CHANNELS + tl.arange(0, CHANNELS)
    bias_to = d_bias + (row * tl.cdiv(tl.cdiv(tokens, L), CHUNKS) + block) * D + channel
    chunks_backward(
        projected, gate_bias, cosines, sines, positions, runs, current_weights, d_current_scores, d_heads,
        d_rotated_queries, d_summary_keys, d_summary_values, d_projected, saved, bias_to,
        row, block, tokens, g, channel, L, N, G, H, ROPE, SEGMENTED, CHUNKS, PIECE, PIECES,
    )  # fmt: skip


def backward_launch(shape: RatShape) -> Launch:
    """`rat_recurrence_backward` for these sizes; the inputs are those of the kernel in their order."""
    channels = min(64, next_power_of_2(shape.head_dim))
    pieces = cdiv(shape.chunk_size, PIECE_TOKENS)
    chunks = min(8, cdiv(PROGRAM_TOKENS, shape.chunk_size), shape.num_chunks)
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
            ("PIECE", cdiv(shape.chunk_size, pieces)),
            ("PIECES", pieces),
        ),
        num_warps=1,
        num_stages=1,
        overwritten=(12,),
    )
