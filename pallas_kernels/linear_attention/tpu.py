"""Causal linear attention on TPU, the core of residual linear attention (arXiv 2506.15545): entry points."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.launch.tpu import Interpret
from pallas_kernels.linear_attention import tpu_kernels
from pallas_kernels.linear_attention.shape import LinearAttentionShape
from pallas_kernels.linear_attention.tpu_tiling import (
    Tiles,
    Tiling,
    document_rows,
    from_columns,
    pad_state,
    to_columns,
    unpad_state,
)

FORWARD_KERNELS = (tpu_kernels.FORWARD_NAME,)
BACKWARD_KERNELS = (tpu_kernels.BACKWARD_NAME,)


class LinearResiduals(NamedTuple):
    """What the backward pass keeps of a forward pass besides its arguments."""

    states: jax.Array  # [B, K, tiles, features, lanes]: what each tile starts from, without the initial state


@functools.partial(jax.jit, static_argnames=("shape", "interpret", "tiles"))
def linear_attention_forward(
    shape: LinearAttentionShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    interpret: Interpret = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, LinearResiduals]:
    """out_t = phi(q_t) (S_0 + sum_{s <= t} phi(k_s)^T v_s), the sum over the s of the same document; no normaliser.

    phi(x) = [m(x), m(-x)] in float32, m the softmax over the H channels or the positive part; head n reads key head
    n // (N / K). Features and states enter products in the dtype of `value`; all sums are float32.

    Args:
      shape: sizes for which `tpu_tiling.unsupported_reason` has no reason.
      query: [B, T, N, H] bfloat16 or float32; `key` and `value` are [B, T, K, H], all of one dtype.
      initial_state: S_0 [1 or B, K or N, 2 H, H]; None is zero.
      segment_ids: int32 [B, T], never falling along a row; tokens of one number are one document. None: all are.
      interpret: run without a TPU, as `pallas_call` means it.
      tiles: block sizes; None is `tpu_tiling.default_tiles`.

    Returns:
      out [B, T, N, H]; the sum over the last document's tokens, without S_0, float32 [B, K, 2 H, H]; residuals.
    """
    tiling = Tiling.of(shape, tiles)
    operands = _operands(tiling, query, key, value, initial_state, segment_ids)
    results = tpu_kernels.forward(tiling, *operands, interpret=interpret)
    out, final_state = from_columns(tiling, results["out"]), unpad_state(tiling, results["final_state"])
    return out, final_state, LinearResiduals(results["states"])


@functools.partial(jax.jit, static_argnames=("shape", "interpret", "tiles"))
def linear_attention_backward(
    shape: LinearAttentionShape,
    residuals: LinearResiduals,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    d_final_state: jax.Array,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    interpret: Interpret = False,
    tiles: Tiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and initial state (None without one), each in its array's shape and dtype.

    `d_out` [B, T, N, H] and `d_final_state` [B, K, 2 H, H] are those of the first two results of
    `linear_attention_forward`, which gave `residuals` and takes the other arguments.
    """
    tiling = Tiling.of(shape, tiles)
    query, key, value, initial, rows = _operands(tiling, query, key, value, initial_state, segment_ids)
    grads = tpu_kernels.backward(
        tiling,
        residuals.states,
        query,
        key,
        value,
        to_columns(tiling, d_out.astype(tiling.dtype)),
        pad_state(tiling, d_final_state.astype(jnp.float32)),
        initial,
        rows,
        interpret,
    )
    d_initial_state = None
    if initial_state is not None:
        d_initial = unpad_state(tiling, grads["d_initial"])
        if initial_state.shape[0] == 1:
            d_initial = jnp.sum(d_initial, axis=0, keepdims=True)
        d_initial_state = d_initial.astype(initial_state.dtype)
    return *(from_columns(tiling, grads[name]) for name in ("d_query", "d_key", "d_value")), d_initial_state


def _operands(tiling: Tiling, query, key, value, initial_state, segment_ids):
    initial = None if initial_state is None else pad_state(tiling, initial_state.astype(tiling.dtype))
    return *(to_columns(tiling, x) for x in (query, key, value)), initial, document_rows(tiling, segment_ids)
