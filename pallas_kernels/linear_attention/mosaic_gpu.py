"""Causal linear attention with a `key_lag` by Mosaic GPU, the core of residual linear attention (arXiv 2506.15545).

    out_t = phi(q_t) sum_{s <= t - key_lag} phi(k_s)^T v_s,

phi(x) = [m(x), m(-x)] in float32, m the softmax over the H channels or the positive part; no normaliser, no decay.
Features enter products in the dtype of `value`, and sums are float32.

A row is cut into tiles of L = 64 tokens, between which scores are made, and into blocks of four, from whose states
those of its tiles are made, rounded each time. Products count for whole tiles. Multiply-adds, a token:

    states (`linear_attention_sums`)                     2 K H^2
    `linear_attention_outputs`                           2 N H^2 + 4 N L H + 3/4 2 K H^2
    `linear_attention_queries`                           2 N H^2 + 4 N L H + 3/4 2 K H^2
    `linear_attention_keys`, reverse states and d_v too  2 N H^2 + 4 K H^2 + 8 N L H

Each half of the features takes the product of scores and values by itself in `linear_attention_outputs`, that of d_out
and values in `linear_attention_queries`, and in `linear_attention_keys` that and the one of scores and d_out. Aligned
the arrays, states are written once and read once: H^2 K / 2 L elements a token forward, which are kept for the backward
pass, where they are read again; those in reverse stay in registers. Where rows are too few to fill a card they are cut
into segments, and the products of the states are taken twice.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.linear_attention.mosaic_gpu_keys import keys_gradients
from pallas_kernels.linear_attention.mosaic_gpu_outputs import outputs
from pallas_kernels.linear_attention.mosaic_gpu_queries import queries_gradient
from pallas_kernels.linear_attention.mosaic_gpu_sums import entering_sums, running_sums
from pallas_kernels.linear_attention.mosaic_gpu_tiling import Tiling
from pallas_kernels.linear_attention.shape import LinearAttentionShape

_ROWS = 8  # of an array that a copy takes at once, so that rows have whole multiples of them


class LinearResiduals(NamedTuple):
    """What the backward pass keeps of a forward pass besides its arguments."""

    states: jax.Array  # [B, K, C, 2, H, H]: what each block of four tiles starts from


def linear_attention_forward(
    shape: LinearAttentionShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_state: None = None,
    segment_ids: None = None,
) -> tuple[jax.Array, jax.Array, LinearResiduals]:
    """The module's equation; head n reads key head n // (N / K).

    Args:
      shape: sizes for which `mosaic_gpu_tiling.unsupported_reason` has no reason.
      query: [B, T, N, H] bfloat16 or float16; `key` and `value` are [B, T, K, H], all of one dtype.
      initial_state, segment_ids: of the other back ends; not taken.

    Returns:
      out [B, T, N, H]; the sum that the last token reads, float32 [B, K, 2 H, H]; residuals.
    """
    del initial_state, segment_ids
    tiling = Tiling(shape)
    query, key, value = _padded(query), _padded(key, tiling.rest), _padded(value, tiling.rest)
    nothing = jnp.zeros((shape.batch, shape.key_heads, 2 * shape.head_dim, shape.head_dim), jnp.float32)
    states, final_state = running_sums(tiling, key, value, nothing)
    out = outputs(tiling, query, key, value, states)
    return out[:, : shape.tokens], final_state, LinearResiduals(states)


def linear_attention_backward(
    shape: LinearAttentionShape,
    residuals: LinearResiduals,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    d_final_state: jax.Array,
    initial_state: None = None,
    segment_ids: None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Gradients of query, key and value, each in its array's shape and dtype, and None for the initial state.

    `d_out` [B, T, N, H] and `d_final_state` [B, K, 2 H, H] are those of the first two results of
    `linear_attention_forward`, which gave `residuals` and takes the other arguments.
    """
    del initial_state, segment_ids
    tiling = Tiling(shape)
    rest = tiling.rest
    d_out, d_final_state = _padded(d_out.astype(query.dtype)), d_final_state.astype(jnp.float32)
    query, key, value = _padded(query), _padded(key, rest), _padded(value, rest)
    d_query, logs = queries_gradient(tiling, query, key, value, d_out, residuals.states)
    entering = entering_sums(tiling, query, d_out, d_final_state, reverse=True)
    d_key, d_value = keys_gradients(tiling, query, key, value, d_out, entering, logs)
    d_key, d_value = (jnp.pad(x[:, rest:], [(0, 0), (0, rest), (0, 0), (0, 0)]) for x in (d_key, d_value))
    return *(x[:, : shape.tokens] for x in (d_query, d_key, d_value)), None


def _padded(x: jax.Array, shift: int = 0) -> jax.Array:
    """`shift` zeros precede the first token, and zeros follow the last up to what a copy takes."""
    if not shift and x.shape[1] % _ROWS == 0:
        return x
    x = x[:, : x.shape[1] - shift]
    return jnp.pad(x, [(0, 0), (shift, -(x.shape[1] + shift) % _ROWS), (0, 0), (0, 0)])
