"""Causal linear attention with a key_lag by Mosaic GPU, the core of residual linear attention (arXiv 2506.15545).

    out_t = phi(q_t) sum_{s <= t - key_lag} phi(k_s)^T v_s,

phi(x) = [m(x), m(-x)] in float32, m the softmax over the H channels or the positive part; no normaliser, no decay.
Features enter products in the dtype of `value`, and sums are float32.

A row is cut into tiles of L = 64 tokens, between which scores are made, and into blocks of four, from whose states
those of its tiles are made, rounded each time. Products count for whole tiles. Multiply-adds, a token:

    states (`linear_attention_sums`)                     2 K H^2
    `linear_attention_outputs`                           2 N H^2 + 4 N L H + 3/4 2 K H^2
    reverse states, of every tile, the same kernel       2 N H^2
    `linear_attention_queries`                           2 N H^2 + 4 N L H + 3/4 2 K H^2
    `linear_attention_keys`, which gives d_v too         4 K H^2 + 6 N L H

`linear_attention_outputs` takes the product of scores and values, and `linear_attention_queries` that of d_out and
values, once for each half of the features. Beside the arrays, states are written once and read once: H^2 K / 2 L
elements a token forward, which are kept for the backward pass, where they are read again; four times as many in
reverse. Where rows are too few to fill a card they are cut into segments, and the products of the states are taken
twice.

Memory limits the kernels: of one H100's rate they reach 66 to 92 % (`docs/performance.md`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.launch.mosaic_gpu import ROWS
from pallas_kernels.linear_attention.mosaic_gpu_keys import keys_gradients
from pallas_kernels.linear_attention.mosaic_gpu_outputs import outputs
from pallas_kernels.linear_attention.mosaic_gpu_queries import queries_gradient
from pallas_kernels.linear_attention.mosaic_gpu_sums import running_sums
from pallas_kernels.linear_attention.mosaic_gpu_tiling import LinearProblem, refusal

__all__ = ["LinearResiduals", "linear_attention_backward", "linear_attention_forward", "refusal"]

_ROWS = 8  # of an array that a copy takes at once, so that rows have whole multiples of them


class LinearResiduals(NamedTuple):
    """What the backward pass keeps of a forward pass beside its arguments."""

    states: jax.Array  # [B, K, C, 2, H, H]: what each block of four tiles starts from


def linear_attention_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, *, feature_map: str, key_lag: int = 0
) -> tuple[jax.Array, jax.Array, LinearResiduals]:
    """The module's equation; head n reads key head n // (N / K).

    Args:
      query: [B, T, N, H] bfloat16 or float16; `key` and `value` are [B, T, K, H], all of one dtype.
      feature_map: "softmax" or "relu".
      key_lag: tokens after which a key and its value are seen, 0 or more.

    Returns:
      out [B, T, N, H]; the sum that the last token reads, float32 [B, K, 2 H, H]; residuals.

    Raises:
      ValueError: with the text of `refusal`, if the kernels do not take these shapes.
    """
    p, late = _problem(query, key, value, feature_map, key_lag)
    query, key, value = _filled(query), _filled(key, late), _filled(value, late)
    nothing = jnp.zeros((p.batch, p.key_heads, 2 * p.head_dim, p.head_dim), jnp.float32)
    states, final_state = running_sums(p, key, value, nothing, reverse=False)
    out = outputs(p, query, key, value, states)
    return out[:, : p.tokens], final_state, LinearResiduals(states)


def linear_attention_backward(
    residuals: LinearResiduals,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    d_final_state: jax.Array,
    *,
    feature_map: str,
    key_lag: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of query, key and value, each in its array's shape and dtype.

    `d_out` [B, T, N, H] and `d_final_state` [B, K, 2 H, H] are those of the first two results of
    `linear_attention_forward`, which gave `residuals` and takes the other arguments.
    """
    p, late = _problem(query, key, value, feature_map, key_lag)
    d_out, d_final_state = _filled(d_out.astype(query.dtype)), d_final_state.astype(jnp.float32)
    query, key, value = _filled(query), _filled(key, late), _filled(value, late)
    d_states, _ = running_sums(p, query, d_out, d_final_state, reverse=True)
    d_query = queries_gradient(p, query, key, value, d_out, residuals.states)
    d_key, d_value = keys_gradients(p, query, key, value, d_out, d_states)
    d_key, d_value = (jnp.pad(x[:, late:], [(0, 0), (0, late), (0, 0), (0, 0)]) for x in (d_key, d_value))
    return tuple(x[:, : p.tokens] for x in (d_query, d_key, d_value))


def _problem(query, key, value, feature_map: str, key_lag: int) -> tuple[LinearProblem, int]:
    """The sizes, and by how many tokens keys and values are to be put off beside the key_lag that kernels take."""
    reason = refusal(query.shape, key.shape, query.dtype)
    if reason is None and (value.shape != key.shape or not query.dtype == key.dtype == value.dtype):
        reason = (
            f"value must have the shape of key, and both the dtype of query: got {value.shape} and {key.shape}, "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if reason is not None:
        raise ValueError(reason)
    if feature_map not in ("softmax", "relu"):
        raise ValueError(f"feature_map must be 'softmax' or 'relu', got {feature_map!r}")
    if key_lag < 0:
        raise ValueError(f"key_lag must be 0 or more, got {key_lag}")
    key_lag = min(key_lag, query.shape[1])
    late = 0 if key_lag % ROWS == 1 else key_lag % ROWS
    sizes = *query.shape[:3], *key.shape[2:], query.dtype.name, feature_map, key_lag - late
    return LinearProblem(*sizes), late


def _filled(x: jax.Array, late: int = 0) -> jax.Array:
    """Zeros stand in front of the first token, and after the last up to what a copy takes."""
    if not late and x.shape[1] % _ROWS == 0:
        return x
    x = x[:, : x.shape[1] - late]
    return jnp.pad(x, [(0, 0), (late, -(x.shape[1] + late) % _ROWS), (0, 0), (0, 0)])
