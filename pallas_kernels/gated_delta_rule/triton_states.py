"""Goes through the chunks of rows in order: corrections, and the state before every chunk."""

import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule.triton_tiles import (
    load_numbers,
    load_state,
    load_tokens,
    square,
    store_state,
    store_tokens,
)
from pallas_kernels.gated_delta_rule.triton_tiling import Tiling
from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch


@triton.jit(do_not_specialize=["tokens"])
def gated_delta_states(
    key,  # [B, T, N, HK]
    value,  # [B, T, N, HV]
    write_strength,  # [B, T, N] float32
    solve,  # [B, N, C, L, L]
    from_start,  # [B, N, C, L] float32
    to_end,  # [B, N, C, L] float32
    initial,  # [B, N, HK, HV] float32; read only if CONTINUED
    tokens,  # T
    corrections,  # [B, T, N, HV]
    states,  # [B, N, C, HK, HV]: before each chunk
    final,  # [B, N, HK, HV] float32
    N: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    CHUNK: tl.constexpr,
    KEYS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CONTINUED: tl.constexpr,
):
    """One program goes through a row with COLUMNS value channels of a head."""
    PARTS: tl.constexpr = (HV + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % PARTS * COLUMNS
    n = tl.program_id(0) // PARTS
    row = tl.program_id(1).to(tl.int64)
    chunks = tl.cdiv(tokens, CHUNK)
    i = tl.arange(0, CHUNK)
    dtype = key.dtype.element_ty
    state = tl.zeros([KEYS, COLUMNS], tl.float32)
    if CONTINUED:
        state = load_state(initial, row * N + n, column, HK, HV, KEYS, COLUMNS)
    for chunk in range(chunks):
        at_chunk = (row * N + n) * chunks + chunk
        k = load_tokens(key, row, chunk, tokens, n, 0, N, HK, CHUNK, KEYS)
        v = load_tokens(value, row, chunk, tokens, n, column, N, HV, CHUNK, COLUMNS)
        solved = tl.load(solve + square(at_chunk, CHUNK))
        strength = load_numbers(write_strength, row, chunk, tokens, n, N, CHUNK)
        first = tl.load(from_start + at_chunk * CHUNK + i)
        last = tl.load(to_end + at_chunk * CHUNK + i)
        kept = tl.load(from_start + at_chunk * CHUNK + CHUNK - 1)
        rounded = state.to(dtype)
        store_state(states, rounded, at_chunk, column, HK, HV, KEYS, COLUMNS)
        held = tl.dot(k, rounded)
        wanted = strength[:, None] * (v.to(tl.float32) - first[:, None] * held)
        u = tl.dot(solved, wanted.to(dtype))
        store_tokens(corrections, u, row, chunk, tokens, n, column, N, HV, CHUNK, COLUMNS)
        added = (last[:, None] * u).to(dtype)
        state = tl.dot(tl.trans(k), added, kept * state)
    store_state(final, state, row * N + n, column, HK, HV, KEYS, COLUMNS)


def states_launch(tiling: Tiling) -> Launch:
    """`gated_delta_states`; the inputs are those of the kernel in their order."""
    shape, blocks = tiling.shape, tiling.state_blocks
    state = (shape.key_dim, shape.value_dim)
    return Launch(
        kernel=gated_delta_states,
        grid=(shape.num_heads * cdiv(shape.value_dim, blocks.columns), shape.batch),
        integers=(shape.tokens,),
        outputs=(
            ((shape.batch, shape.tokens, shape.num_heads, shape.value_dim), shape.dtype),
            ((shape.batch, shape.num_heads, tiling.chunks, *state), shape.dtype),
            ((shape.batch, shape.num_heads, *state), "float32"),
        ),
        constants=(*tiling.constants(), ("COLUMNS", blocks.columns), ("CONTINUED", shape.continued)),
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
