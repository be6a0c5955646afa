"""One new token a row: the gated delta rule as one update of each state, which is read and written once, in place.

With S the state before the token, or zero where its document begins with it, a what is kept and b the write strength,
S' = a S + b k (v - a S^T k)^T and out = S'^T q (arXiv 2412.06464, equation 10), all in float32.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels.gated_delta_rule.shape import GatedDeltaRuleShape
from pallas_kernels.gated_delta_rule.triton_tiling import Tiling
from pallas_kernels.launch import triton as launcher
from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.launch.triton import Launch

COLUMNS = 32  # value channels of a state that a program holds, so that a few rows have many programs
CHANNELS = 64  # of keys, that a warp holds of them: 64 numbers a thread


@triton.jit
def gated_delta_rule_step(
    query,  # [B, 1, N, HK]
    key,  # [B, 1, N, HK]
    value,  # [B, 1, N, HV]
    log_decay,  # [B, 1, N] float32
    write_strength,  # [B, 1, N] float32
    goes_on,  # [B] int32: 0 where the token begins a document
    states,  # [B, N, HK, HV] float32, overwritten
    out,  # [B, 1, N, HV]
    states_alias,
    N: tl.constexpr,
    HK: tl.constexpr,
    HV: tl.constexpr,
    KEYS: tl.constexpr,  # HK, padded
    COLUMNS: tl.constexpr,
):
    """One program updates COLUMNS value channels of the state of one row and head."""
    PARTS: tl.constexpr = (HV + COLUMNS - 1) // COLUMNS
    column = tl.program_id(0) % PARTS * COLUMNS + tl.arange(0, COLUMNS)
    at = tl.program_id(1).to(tl.int64) * N + tl.program_id(0) // PARTS  # of the head
    channel = tl.arange(0, KEYS)
    own, written = channel < HK, column < HV
    tile_at = states + (at * HK + channel)[:, None] * HV + column[None, :]
    tile = own[:, None] & written[None, :]
    state = tl.load(tile_at, mask=tile & (tl.load(goes_on + tl.program_id(1)) != 0), other=0.0)
    k = tl.load(key + at * HK + channel, mask=own, other=0.0).to(tl.float32)[:, None]
    q = tl.load(query + at * HK + channel, mask=own, other=0.0).to(tl.float32)[:, None]
    v = tl.load(value + at * HV + column, mask=written, other=0.0).to(tl.float32)
    state = state * tl.exp(tl.load(log_decay + at))
    correction = tl.load(write_strength + at) * (v - tl.sum(state * k, axis=0))
    state = state + k * correction[None, :]
    tl.store(tile_at, state, mask=tile)
    tl.store(out + at * HV + column, tl.sum(state * q, axis=0).to(out.dtype.element_ty), mask=written)


def step(
    shape: GatedDeltaRuleShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    log_decay: jax.Array,
    write_strength: jax.Array,
    goes_on: jax.Array,
    state: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Out [B, 1, N, Hv] and the state with the token, in place where `state` is donated.

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason, of one token that continues a state.
      query, key: [B, 1, N, Hk].
      value: [B, 1, N, Hv], of the dtype of both.
      log_decay: [B, 1, N] float32, finite.
      write_strength: [B, 1, N] float32.
      goes_on: [B] bool; rows where it is False start from no state.
      state: [B, N, Hk, Hv] float32.
    """
    goes_on = goes_on.astype(jnp.int32)
    return launcher.run(step_launch(shape), query, key, value, log_decay, write_strength, goes_on, state)


def step_launch(shape: GatedDeltaRuleShape) -> Launch:
    """`gated_delta_rule_step` for these sizes."""
    keys = Tiling(shape).keys
    return Launch(
        kernel=gated_delta_rule_step,
        grid=(shape.num_heads * cdiv(shape.value_dim, COLUMNS), shape.batch),
        integers=(),
        outputs=(((shape.batch, 1, shape.num_heads, shape.value_dim), shape.dtype),),
        constants=(
            ("N", shape.num_heads),
            ("HK", shape.key_dim),
            ("HV", shape.value_dim),
            ("KEYS", keys),
            ("COLUMNS", COLUMNS),
        ),
        num_warps=cdiv(keys, CHANNELS),
        num_stages=1,
        overwritten=(6,),
    )
