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
the states once more, and `linear_attention_scan` adds up. The triangle above the diagonal is computed too. Beside the
arrays, states are written once and read once in each direction: 2 K H^2 / L elements a token; those of the forward pass
are kept for the backward pass. Sums of segments, in float32, do not grow with T.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.launch import triton as launcher
from pallas_kernels.linear_attention import triton_backward
from pallas_kernels.linear_attention.triton_outputs import outputs_launch
from pallas_kernels.linear_attention.triton_states import scan_launch, states_launch, totals_launch
from pallas_kernels.linear_attention.triton_tiling import LinearProblem, refusal

__all__ = ["LinearResiduals", "linear_attention_backward", "linear_attention_forward", "refusal"]


class LinearResiduals(NamedTuple):
    """What the backward pass keeps of a forward pass beside its arguments."""

    states: jax.Array  # [B, K, C, 2, P, P]: what each block starts from, without the initial state


def linear_attention_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    feature_map: str,
    initial_state: jax.Array | None = None,
    documents: jax.Array | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, LinearResiduals]:
    """The module's equation; head n reads key head n // (N / K).

    Args:
      query: [B, T, N, H] bfloat16, float16 or float32; `key` and `value` are [B, T, K, H], all of one dtype.
      feature_map: "softmax" or "relu".
      initial_state: S_0 [1 or B, K or N, 2 H, H]; None is zero.
      documents: int32 [B, T], never falling along a row; tokens of one number are one document. None: all are.
      capability: compute capability of the card, by which blocks are chosen. None: as on Hopper.

    Returns:
      out [B, T, N, H]; the sum over the last document's tokens, without S_0, float32 [B, K, 2 H, H]; residuals.

    Raises:
      ValueError: with the text of `refusal`, if the kernels do not take these shapes.
    """
    problem = _problem(query, key, value, feature_map, initial_state, documents, capability)
    arrays = query, key, value, *_placed(problem, initial_state, documents)
    out, final_state, states = forward(launcher.run, problem, *arrays)
    return out, final_state, LinearResiduals(states)


def linear_attention_backward(
    residuals: LinearResiduals,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    d_out: jax.Array,
    d_final_state: jax.Array,
    *,
    feature_map: str,
    initial_state: jax.Array | None = None,
    documents: jax.Array | None = None,
    capability: tuple[int, int] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and initial state (None without one), each in its array's shape and dtype.

    `d_out` [B, T, N, H] and `d_final_state` [B, K, 2 H, H] are those of the first two results of
    `linear_attention_forward`, which gave `residuals` and takes the other arguments.
    """
    problem = _problem(query, key, value, feature_map, initial_state, documents, capability)
    initial, documents = _placed(problem, initial_state, documents)
    d_out, d_final_state = d_out.astype(query.dtype), d_final_state.astype(jnp.float32)
    arrays = residuals.states, query, key, value, d_out, d_final_state, initial, documents
    *of_tokens, d_initial = backward(launcher.run, problem, *arrays)
    return *of_tokens, None if initial_state is None else d_initial.astype(initial_state.dtype)


def forward(run: launcher.Run, p: LinearProblem, query, key, value, initial, documents) -> tuple[Any, Any, Any]:
    """The forward kernels through `run`, on the arrays of whatever library it runs them with: out, final, states.

    `initial` has the dtype of `value`; it and `documents` are placeholders of one element where there is none.
    """
    states, final_state = _states(run, p, key, value, documents, initial, p.key_heads, reverse=False)
    (out,) = run(outputs_launch(p), query, key, value, states, initial, documents)
    return out, final_state, states


def backward(run: launcher.Run, p: LinearProblem, states, query, key, value, d_out, d_final_state, initial, documents):
    """The backward kernels through `run`: gradients of query, key, value and initial state (None: there is none)."""
    d_states, _ = _states(run, p, query, d_out, documents, d_final_state, p.num_heads, reverse=True)
    d_key, d_value = run(triton_backward.keys_launch(p), query, key, value, d_out, d_states, documents)
    (d_query,) = run(triton_backward.queries_launch(p), query, key, value, d_out, states, initial, documents)
    d_initial = _d_initial(run, p, query, d_out, documents) if p.initial_heads else None
    return d_query, d_key, d_value, d_initial


def _states(
    run: launcher.Run, p: LinearProblem, x, y, documents, entering, heads: int, reverse: bool
) -> tuple[Any, Any]:
    if p.segments == 1:
        return run(states_launch(p, heads, reverse), x, y, entering, documents)
    (totals,) = run(totals_launch(p, heads, reverse), x, y, documents)
    starts, final = run(scan_launch(p, reverse), totals, entering, documents)
    return run(states_launch(p, heads, reverse), x, y, starts, documents)[0], final


def _d_initial(run: launcher.Run, p: LinearProblem, query, d_out, documents):
    """phi(q)^T d_out over all tokens, of whatever document."""
    whole = p.without_documents(p.initial_heads)
    (totals,) = run(totals_launch(whole, p.num_heads, reverse=False), query, d_out, documents)
    total = totals.sum(axis=2)[..., : p.head_dim, : p.head_dim]
    if p.initial_rows == 1:
        total = total.sum(axis=0)[None]
    return total.reshape(p.initial_rows, p.initial_heads, 2 * p.head_dim, p.head_dim)


def _problem(query, key, value, feature_map, initial_state, documents, capability) -> LinearProblem:
    initial_shape = None if initial_state is None else initial_state.shape
    reason = refusal(query.shape, key.shape, query.dtype, initial_shape=initial_shape)
    if reason is None and (value.shape != key.shape or not query.dtype == key.dtype == value.dtype):
        reason = (
            f"value must have the shape of key, and both the dtype of query: got {value.shape} and {key.shape}, "
            f"{query.dtype}, {key.dtype} and {value.dtype}"
        )
    if reason is not None:
        raise ValueError(reason)
    if feature_map not in ("softmax", "relu"):
        raise ValueError(f"feature_map must be 'softmax' or 'relu', got {feature_map!r}")
    return LinearProblem(
        *query.shape[:3],
        *key.shape[2:],
        query.dtype.name,
        feature_map,
        documents is not None,
        *(initial_shape or (0, 0))[:2],
        capability,
    )


def _placed(p: LinearProblem, initial_state, documents) -> tuple[jax.Array, jax.Array]:
    initial = jnp.zeros((1, 1, 1, 1), p.dtype) if initial_state is None else initial_state.astype(p.dtype)
    return initial, jnp.zeros((1, 1), jnp.int32) if documents is None else documents.astype(jnp.int32)
