"""Causal linear attention by Triton kernels, the core of residual linear attention (arXiv 2506.15545), for GPUs.

    out_t = phi(q_t) (S_0 + sum_{s <= t} phi(k_s)^T v_s), the sum over the s of the same document,

phi(x) = [m(x), m(-x)] in float32, m the softmax over the H channels or the positive part; no normaliser, no decay.
Features are made inside the kernels, half by half, enter products in the dtype of `value`, and sums are float32.

A row is cut into blocks of L tokens (64 in 16-bit types up to H = 128, less elsewhere). Multiply-adds, a token:

    states (`linear_attention_states`)                        2 K H^2
    `linear_attention_outputs`                                N (2 H^2 + 3 L H)
    reverse states, the same kernel                           2 N H^2
    `linear_attention_keys`, which gives d_v too              4 K H^2 + 6 N L H
    `linear_attention_queries`                                N (2 H^2 + 3 L H)

Where rows are too few to fill a card they are cut into segments: `linear_attention_totals` then takes the products of
the states once more, and `linear_attention_scan` adds up. The triangle above the diagonal is computed too. Aligned the
arrays, states are written once and read once in each direction: 2 K H^2 / L elements a token; those of the forward pass
are kept for the backward pass. Sums of segments, in float32, do not grow with T.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.launch import triton as launcher
from pallas_kernels.linear_attention import triton_backward
from pallas_kernels.linear_attention.shape import LinearAttentionShape
from pallas_kernels.linear_attention.triton_outputs import outputs_launch
from pallas_kernels.linear_attention.triton_states import scan_launch, states_launch, totals_launch
from pallas_kernels.linear_attention.triton_tiling import Tiling


class LinearResiduals(NamedTuple):
    """What the backward pass keeps of a forward pass besides its arguments."""

    states: jax.Array  # [B, K, C, 2, P, P]: what each block starts from, without the initial state


def linear_attention_forward(
    shape: LinearAttentionShape,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    initial_state: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, LinearResiduals]:
    """The module's equation; head n reads key head n // (N / K).

    Args:
      shape: sizes for which `triton_tiling.unsupported_reason` has no reason.
      query: [B, T, N, H] bfloat16, float16 or float32; `key` and `value` are [B, T, K, H], all of one dtype.
      initial_state: S_0 [1 or B, K or N, 2 H, H]; None is zero.
      segment_ids: int32 [B, T], never falling along a row; tokens of one number are one document. None: all are.

    Returns:
      out [B, T, N, H]; the sum over the last document's tokens, without S_0, float32 [B, K, 2 H, H]; residuals.
    """
    tiling = Tiling(shape)
    arrays = query, key, value, *_or_placeholders(tiling, initial_state, segment_ids)
    out, final_state, states = forward(launcher.run, tiling, *arrays)
    return out, final_state, LinearResiduals(states)


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
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and initial state (None without one), each in its array's shape and dtype.

    `d_out` [B, T, N, H] and `d_final_state` [B, K, 2 H, H] are those of the first two results of
    `linear_attention_forward`, which gave `residuals` and takes the other arguments.
    """
    tiling = Tiling(shape)
    initial, segment_ids = _or_placeholders(tiling, initial_state, segment_ids)
    d_out, d_final_state = d_out.astype(query.dtype), d_final_state.astype(jnp.float32)
    arrays = residuals.states, query, key, value, d_out, d_final_state, initial, segment_ids
    *of_tokens, d_initial = backward(launcher.run, tiling, *arrays)
    return *of_tokens, None if initial_state is None else d_initial.astype(initial_state.dtype)


def forward(run: launcher.Run, tiling: Tiling, query, key, value, initial, segment_ids) -> tuple[Any, Any, Any]:
    """The forward kernels through `run`, on the arrays of whatever library it runs them with: out, final, states.

    `initial` has the dtype of `value`; it and `segment_ids` are placeholders of one element where there is none.
    """
    states, final_state = _states(run, tiling, key, value, segment_ids, initial, tiling.shape.key_heads, reverse=False)
    (out,) = run(outputs_launch(tiling), query, key, value, states, initial, segment_ids)
    return out, final_state, states


def backward(run: launcher.Run, tiling: Tiling, states, query, key, value, d_out, d_final_state, initial, segment_ids):
    """The backward kernels through `run`: gradients of query, key, value and initial state (None: there is none)."""
    d_states, _ = _states(run, tiling, query, d_out, segment_ids, d_final_state, tiling.shape.num_heads, reverse=True)
    d_key, d_value = run(triton_backward.keys_launch(tiling), query, key, value, d_out, d_states, segment_ids)
    (d_query,) = run(triton_backward.queries_launch(tiling), query, key, value, d_out, states, initial, segment_ids)
    d_initial = _d_initial(run, tiling, query, d_out, segment_ids) if tiling.shape.initial_heads else None
    return d_query, d_key, d_value, d_initial


def _states(
    run: launcher.Run, tiling: Tiling, x, y, segment_ids, entering, heads: int, reverse: bool
) -> tuple[Any, Any]:
    if tiling.segments == 1:
        return run(states_launch(tiling, heads, reverse), x, y, entering, segment_ids)
    (totals,) = run(totals_launch(tiling, heads, reverse), x, y, segment_ids)
    starts, final = run(scan_launch(tiling, reverse), totals, entering, segment_ids)
    return run(states_launch(tiling, heads, reverse), x, y, starts, segment_ids)[0], final


def _d_initial(run: launcher.Run, tiling: Tiling, query, d_out, segment_ids):
    """phi(q)^T d_out over all tokens, of whatever document."""
    whole = tiling.without_documents(tiling.shape.initial_heads)
    (totals,) = run(totals_launch(whole, tiling.shape.num_heads, reverse=False), query, d_out, segment_ids)
    total = totals.sum(axis=2)[..., : tiling.shape.head_dim, : tiling.shape.head_dim]
    if tiling.shape.initial_rows == 1:
        total = total.sum(axis=0)[None]
    return total.reshape(
        tiling.shape.initial_rows, tiling.shape.initial_heads, 2 * tiling.shape.head_dim, tiling.shape.head_dim
    )


def _or_placeholders(tiling: Tiling, initial_state, segment_ids) -> tuple[jax.Array, jax.Array]:
    """Both arrays as the kernels take them, of one element where there is none."""
    dtype = tiling.shape.dtype
    initial = jnp.zeros((1, 1, 1, 1), dtype) if initial_state is None else initial_state.astype(dtype)
    return initial, jnp.zeros((1, 1), jnp.int32) if segment_ids is None else segment_ids.astype(jnp.int32)
