"""Prepares every chunk of the gated delta rule by itself: its triangular system, scores and decays."""

import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule.triton_tiles import decays, decays_of_ends, load_numbers, load_tokens, square
from pallas_kernels.gated_delta_rule.triton_tiling import Tiling
from pallas_kernels.launch.triton import Launch


@triton.jit(do_not_specialize=["tokens"])
def gated_delta_chunks(
    query,  # [B, T, N, HK]
    key,  # [B, T, N, HK]
    log_decay,  # [B, T, N] float32
    write_strength,  # [B, T, N] float32
    starts,  # [B, T] int32: 1 at the first token of a document; read only if SEGMENTED
    tokens,  # T
    solve,  # [B, N, C, L, L]: (I + A)^-1
    scores,  # [B, N, C, L, L]: what a query reads of each correction
    from_start,  # [B, N, C, L] float32
    to_end,  # [B, N, C, L] float32
    N: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SEGMENTED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program takes one chunk of a head, and COLUMNS key channels at a time."""
    n = tl.program_id(0) % N
    chunk = tl.program_id(0) // N
    row = tl.program_id(1).to(tl.int64)
    overlaps = tl.zeros([CHUNK, CHUNK], tl.float32)
    read = tl.zeros([CHUNK, CHUNK], tl.float32)
    for column in tl.static_range(0, KEYS, COLUMNS):
        k = load_tokens(key, row, chunk, tokens, n, column, N, HK, CHUNK, COLUMNS)
        q = load_tokens(query, row, chunk, tokens, n, column, N, HK, CHUNK, COLUMNS)
        overlaps = tl.dot(k, tl.trans(k), overlaps)
        read = tl.dot(q, tl.trans(k), read)
    first, last = decays_of_ends(log_decay, starts, row, chunk, tokens, n, N, CHUNK, SEGMENTED)
    at_chunk = (row * N + n) * tl.cdiv(tokens, CHUNK) + chunk
    i = tl.arange(0, CHUNK)
    tl.store(from_start + at_chunk * CHUNK + i, first)
    tl.store(to_end + at_chunk * CHUNK + i, last)
    decay = decays(log_decay, starts, row, chunk, tokens, n, N, CHUNK, SEGMENTED)
    tl.store(scores + square(at_chunk, CHUNK), (decay * read).to(scores.dtype.element_ty))
    strength = load_numbers(write_strength, row, chunk, tokens, n, N, CHUNK)
    a = tl.where(i[:, None] > i[None, :], strength[:, None] * decay * overlaps, 0.0)
    tl.store(solve + square(at_chunk, CHUNK), unit_lower_inverse(a, CHUNK, PRECISION).to(solve.dtype.element_ty))


@triton.jit
def unit_lower_inverse(a, L: tl.constexpr, PRECISION: tl.constexpr):
    """(I + a)^-1 of a strictly lower triangular [L, L].

    The blocks of 16 along the diagonal by elimination, all at once, column after column; then blocks double in size:
    with both halves X and Z of a block inverted, its lower left quarter is -Z a X.
    """
    BLOCKS: tl.constexpr = L // 16
    i, b = tl.arange(0, 16), tl.arange(0, BLOCKS)
    same = b[:, None, None, None] == b[None, None, :, None]
    blocks = tl.sum(tl.where(same, tl.reshape(a, [BLOCKS, 16, BLOCKS, 16]), 0.0), 2)
    is_one = (i[None, :, None] == i[None, None, :]) & (b[:, None, None] >= 0)
    x = tl.where(is_one, 1.0, 0.0)
    for j in range(15):
        column = tl.sum(tl.where(i[None, None, :] == j, blocks, 0.0), 2)
        row = tl.sum(tl.where(i[None, :, None] == j, x, 0.0), 1)
        x -= column[:, :, None] * row[:, None, :]
    inverse = tl.reshape(tl.where(same, x[:, :, None, :], 0.0), [L, L])
    if L >= 32:
        inverse = _doubled(inverse, a, 16, L, PRECISION)
    if L >= 64:
        inverse = _doubled(inverse, a, 32, L, PRECISION)
    return inverse


@triton.jit
def _doubled(inverse, a, HALF: tl.constexpr, L: tl.constexpr, PRECISION: tl.constexpr):
    block = tl.arange(0, L) // HALF
    quarter = (block[:, None] % 2 == 1) & (block[:, None] == block[None, :] + 1)
    left = tl.dot(inverse, tl.where(quarter, a, 0.0), input_precision=PRECISION)
    return inverse - tl.dot(left, inverse, input_precision=PRECISION)


def chunks_launch(tiling: Tiling) -> Launch:
    """`gated_delta_chunks`; the inputs are those of the kernel in their order."""
    shape, blocks = tiling.shape, tiling.chunk_blocks
    of_chunks = (shape.batch, shape.num_heads, tiling.chunks, shape.chunk_size)
    squares = (*of_chunks, shape.chunk_size)
    return Launch(
        kernel=gated_delta_chunks,
        grid=(shape.num_heads * tiling.chunks, shape.batch),
        integers=(shape.tokens,),
        outputs=((squares, shape.dtype), (squares, shape.dtype), (of_chunks, "float32"), (of_chunks, "float32")),
        constants=(
            *tiling.constants(),
            ("COLUMNS", blocks.columns),
            ("SEGMENTED", shape.segmented),
            ("PRECISION", tiling.solve_precision),
        ),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
