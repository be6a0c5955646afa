"""What the queries of a chunk read, every chunk by itself."""

import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule.triton_tiles import load_state, load_tokens, square, store_tokens
from pallas_kernels.gated_delta_rule.triton_tiling import Tiling
from pallas_kernels.launch.triton import Launch


@triton.jit(do_not_specialize=["tokens"])
def gated_delta_outputs(
    query,  # [B, T, N, HK]
    corrections,  # [B, T, N, HV]
    states,  # [B, N, C, HK, HV]
    scores,  # [B, N, C, L, L]
    from_start,  # [B, N, C, L] float32
    tokens,  # T
    out,  # [B, T, N, HV]
    N: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One program takes one chunk of a head, and COLUMNS value channels at a time."""
    n = tl.program_id(0) % N
    chunk = tl.program_id(0) // N
    row = tl.program_id(1).to(tl.int64)
    at_chunk = (row * N + n) * tl.cdiv(tokens, CHUNK) + chunk
    q = load_tokens(query, row, chunk, tokens, n, 0, N, HK, CHUNK, KEYS)
    weights = tl.load(scores + square(at_chunk, CHUNK))
    first = tl.load(from_start + at_chunk * CHUNK + tl.arange(0, CHUNK))
    for column in range(0, HV, COLUMNS):
        state = load_state(states, at_chunk, column, HK, HV, KEYS, COLUMNS)
        u = load_tokens(corrections, row, chunk, tokens, n, column, N, HV, CHUNK, COLUMNS)
        carried = first[:, None] * tl.dot(q, state)
        mixed = tl.dot(weights, u, carried)
        store_tokens(out, mixed, row, chunk, tokens, n, column, N, HV, CHUNK, COLUMNS)


def outputs_launch(tiling: Tiling) -> Launch:
    """`gated_delta_outputs`; the inputs are those of the kernel in their order."""
    shape, blocks = tiling.shape, tiling.output_blocks
    return Launch(
        kernel=gated_delta_outputs,
        grid=(shape.num_heads * tiling.chunks, shape.batch),
        integers=(shape.tokens,),
        outputs=(((shape.batch, shape.tokens, shape.num_heads, shape.value_dim), shape.dtype),),
        constants=(*tiling.constants(), ("COLUMNS", blocks.columns)),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
