"""One new token a row: a state is read and written once, in place, by the program that its heads' outputs come from.

The equations are those of `pallas_kernels.linear_attention.triton` for a row of one token: with S the state before it,
or zero where its document begins with it, S' = S + phi(k)^T v and out_n = phi(q_n) (S_0 + S') for each query head.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.launch import triton as launcher
from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch
from pallas_kernels.linear_attention.shape import LinearAttentionShape
from pallas_kernels.linear_attention.triton_features import half_features, load_initial
from pallas_kernels.linear_attention.triton_tiling import Tiling

COLUMNS = 32  # value channels of a state that a program holds, so that a few rows have many programs
CHANNELS = 64  # of keys, that a warp holds of them: 128 numbers a thread; half beside an initial state's


@triton.jit
def linear_attention_step(
    query,  # [B, 1, N, H]
    key,  # [B, 1, K, H]
    value,  # [B, 1, K, H]
    goes_on,  # [B] int32: 0 where the token begins a document
    initial,  # S_0 [INITIAL_ROWS, INITIAL_HEADS, 2 H, H] float32; not read where there are no heads
    states,  # [B, K, 2 H, H] float32, overwritten
    out,  # [B, 1, N, H]
    states_alias,
    N: tl.constexpr,
    K: tl.constexpr,
    H: tl.constexpr,
    P: tl.constexpr,
    COLUMNS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    INITIAL_ROWS: tl.constexpr,
    INITIAL_HEADS: tl.constexpr,
):
    """One program goes over COLUMNS value channels of the state of one row and key head."""
    PARTS: tl.constexpr = (H + COLUMNS - 1) // COLUMNS
    SHARED: tl.constexpr = N // K
    first = tl.program_id(0) % PARTS * COLUMNS
    k = tl.program_id(0) // PARTS
    row = tl.program_id(1).to(tl.int64)
    channel, column = tl.arange(0, P), first + tl.arange(0, COLUMNS)
    own, written = channel < H, column < H
    tile = (own[:, None] & written[None, :]) & (tl.load(goes_on + row) != 0)
    low_at = states + ((row * K + k) * (2 * H) + channel)[:, None] * H + column[None, :]
    low, high = tl.load(low_at, mask=tile, other=0.0), tl.load(low_at + H * H, mask=tile, other=0.0)
    v = tl.load(value + (row * K + k) * H + column, mask=written, other=0.0).to(tl.float32)[None, :]
    of_key = _features(key + (row * K + k) * H, channel, own, H, P, SOFTMAX)
    low, high = low + of_key[0] * v, high + of_key[1] * v
    tl.store(low_at, low, mask=own[:, None] & written[None, :])
    tl.store(low_at + H * H, high, mask=own[:, None] & written[None, :])
    for i in tl.static_range(SHARED):
        n = k * SHARED + i
        of_query = _features(query + (row * N + n) * H, channel, own, H, P, SOFTMAX)
        read_low, read_high = low, high
        if INITIAL_HEADS:
            head = n if INITIAL_HEADS == N else k
            base = initial + ((row if INITIAL_ROWS > 1 else 0) * INITIAL_HEADS + head) * (2 * H * H)
            read_low += load_initial(base, 0, first, H, P, COLUMNS)
            read_high += load_initial(base, 1, first, H, P, COLUMNS)
        y = tl.sum(of_query[0] * read_low + of_query[1] * read_high, axis=0)
        tl.store(out + (row * N + n) * H + column, y.to(out.dtype.element_ty), mask=written)


@triton.jit
def _features(at, channel, own, H: tl.constexpr, P: tl.constexpr, SOFTMAX: tl.constexpr):
    """Both halves of the features of one head, as columns."""
    x = tl.load(at + channel, mask=own, other=0.0).to(tl.float32)[None, :]
    low, high = half_features(x, H, P, SOFTMAX), half_features(-x, H, P, SOFTMAX)
    return tl.trans(low), tl.trans(high)


def step(
    shape: LinearAttentionShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    goes_on: jax.Array,
    initial_state: jax.Array | None,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Out [B, 1, N, H] and the state with the token, in place where `state` is donated.

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason, of one token that continues a state.
      query: [B, 1, N, H].
      key, value: [B, 1, K, H], of the dtype of `query`.
      goes_on: [B] bool; rows where it is False start from no state.
      initial_state: [1 or B, K or N, 2 H, H], or None.
      state: [B, K, 2 H, H] float32.
    """
    # Something that is not the state, which would be copied if it were an argument twice.
    initial = value if initial_state is None else initial_state.astype(jnp.float32)
    return launcher.run(step_launch(shape), query, key, value, goes_on.astype(jnp.int32), initial, state)


def step_launch(shape: LinearAttentionShape) -> Launch:
    """`linear_attention_step` for these sizes."""
    tiling = Tiling(shape)
    columns = min(COLUMNS, tiling.padded)
    return Launch(
        kernel=linear_attention_step,
        grid=(shape.key_heads * cdiv(shape.head_dim, columns), shape.batch),
        integers=(),
        outputs=(((shape.batch, 1, shape.num_heads, shape.head_dim), shape.dtype),),
        constants=(
            ("N", shape.num_heads),
            ("K", shape.key_heads),
            ("H", shape.head_dim),
            ("P", tiling.padded),
            ("COLUMNS", columns),
            ("SOFTMAX", shape.softmax),
            *tiling.initial_constants(),
        ),
        num_warps=cdiv(tiling.padded, CHANNELS // 2 if shape.initial_heads else CHANNELS),
        num_stages=1,
        overwritten=(5,),
    )
