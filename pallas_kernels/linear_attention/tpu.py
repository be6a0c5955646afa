"""Causal linear attention on TPU, the core of residual linear attention (arXiv 2506.15545): entry points."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.launch.tpu import Interpret
from pallas_kernels.linear_attention import tpu_kernels
from pallas_kernels.linear_attention.tpu_tiling import (
    LinearPlan,
    LinearTiles,
    document_rows,
    from_columns,
    initial_bytes,
    make_plan,
    pad_state,
    to_columns,
    unpad_state,
)

FORWARD_KERNELS = (tpu_kernels.FORWARD_NAME,)
BACKWARD_KERNELS = (tpu_kernels.BACKWARD_NAME,)
MAX_HEAD_DIM = 256
_MAX_INITIAL_BYTES = 2**21  # of the initial states of one key head's queries, whose gradients stay in VMEM


class LinearResiduals(NamedTuple):
    """What the backward pass keeps of a forward pass beside its arguments."""

    states: jax.Array  # [B, K, tiles, features, lanes]: what each tile starts from, without the initial state


@functools.partial(jax.jit, static_argnames=("feature_map", "interpret", "tiles"))
def linear_attention_forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    feature_map: str,
    initial_state: jax.Array | None = None,
    documents: jax.Array | None = None,
    interpret: Interpret = False,
    tiles: LinearTiles | None = None,
) -> tuple[jax.Array, jax.Array, LinearResiduals]:
    """out_t = phi(q_t) (S_0 + sum_{s <= t} phi(k_s)^T v_s), the sum over the s of the same document; no normaliser.

    phi(x) = [m(x), m(-x)] in float32, m the softmax over the H channels or the positive part; head n reads key head
    n // (N / K). Features and states enter products in the dtype of `value`; all sums are float32.

    Args:
      query: [B, T, N, H] bfloat16 or float32; `key` and `value` are [B, T, K, H], all of one dtype.
      feature_map: "softmax" or "relu".
      initial_state: S_0 [1 or B, K or N, 2 H, H]; None is zero.
      documents: int32 [B, T], never falling along a row; tokens of one number are one document. None: all are.
      interpret: run without a TPU, as `pallas_call` means it.
      tiles: block sizes; None is `default_tiles`.

    Returns:
      out [B, T, N, H]; the sum over the last document's tokens, without S_0, float32 [B, K, 2 H, H]; residuals.

    Raises:
      ValueError: with the text of `refusal`, if the kernels do not take these shapes.
    """
    plan = _plan(query, key, value, feature_map, initial_state, documents, tiles)
    results = tpu_kernels.forward(
        plan, *_operands(plan, query, key, value, initial_state, documents), interpret=interpret
    )
    out, final_state = from_columns(plan, results["out"]), unpad_state(plan, results["final_state"])
    return out, final_state, LinearResiduals(results["states"])


@functools.partial(jax.jit, static_argnames=("feature_map", "interpret", "tiles"))
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
    interpret: Interpret = False,
    tiles: LinearTiles | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients of query, key, value and initial state (None without one), each in its array's shape and dtype.

    `d_out` [B, T, N, H] and `d_final_state` [B, K, 2 H, H] are those of the first two results of
    `linear_attention_forward`, which gave `residuals` and takes the other arguments.
    """
    plan = _plan(query, key, value, feature_map, initial_state, documents, tiles)
    query, key, value, initial, rows = _operands(plan, query, key, value, initial_state, documents)
    grads = tpu_kernels.backward(
        plan,
        residuals.states,
        query,
        key,
        value,
        to_columns(plan, d_out.astype(plan.dtype)),
        pad_state(plan, d_final_state.astype(jnp.float32)),
        initial,
        rows,
        interpret,
    )
    d_initial_state = None
    if initial_state is not None:
        d_initial = unpad_state(plan, grads["d_initial"])
        if initial_state.shape[0] == 1:
            d_initial = jnp.sum(d_initial, axis=0, keepdims=True)
        d_initial_state = d_initial.astype(initial_state.dtype)
    return *(from_columns(plan, grads[name]) for name in ("d_query", "d_key", "d_value")), d_initial_state


def refusal(
    query_shape: tuple[int, ...],
    key_shape: tuple[int, ...],
    dtype: jax.typing.DTypeLike,
    *,
    initial_shape: tuple[int, ...] | None = None,
) -> str | None:
    """Why query [B, T, N, H], key and value [B, T, K, H] cannot run here and the nearest that can; None if they can.

    Any T >= 1 runs; heads are padded to a multiple of 128 channels.
    """
    if jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)):
        return f"the TPU kernels take bfloat16 or float32, got {jnp.dtype(dtype)}; nearest: float32"
    if len(query_shape) != 4 or min(query_shape) < 1:
        return f"query must be [B, T, N, H] with sizes of 1 or more, got shape {query_shape}"
    batch, tokens, heads, head_dim = query_shape
    if len(key_shape) != 4 or (*key_shape[:2], key_shape[3]) != (batch, tokens, head_dim) or key_shape[2] < 1:
        return f"key must be [B, T, K, H]: got {key_shape}; nearest: ({batch}, {tokens}, {heads}, {head_dim})"
    key_heads = key_shape[2]
    if heads % key_heads:
        above = heads + key_heads - heads % key_heads
        nearest = f"{above - key_heads} or {above}" if heads > key_heads else f"{above}"
        return f"query heads must be a multiple of key heads, got {heads} and {key_heads}; nearest: {nearest} heads"
    if head_dim > MAX_HEAD_DIM:
        return f"the TPU kernels take heads of at most {MAX_HEAD_DIM} channels, got {head_dim}; nearest: {MAX_HEAD_DIM}"
    if initial_shape is None:
        return None
    rows, states, *matrix = initial_shape
    if rows not in (1, batch) or states not in (key_heads, heads) or matrix != [2 * head_dim, head_dim]:
        nearest = (1, key_heads, 2 * head_dim, head_dim)
        return f"initial_state must be [1 or B, K or N, 2 H, H], got {initial_shape}; nearest: {nearest}"
    size = initial_bytes(head_dim, states // key_heads)
    if states > key_heads and size > _MAX_INITIAL_BYTES:
        most = _MAX_INITIAL_BYTES // initial_bytes(head_dim, 1)
        return (
            f"the TPU kernels take at most {most} initial states of {head_dim} channels a key "
            f"head, got {states // key_heads}; nearest: one for each of {key_heads} key heads"
        )
    return None


def _plan(query, key, value, feature_map, initial_state, documents, tiles) -> LinearPlan:
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
    return make_plan(
        query,
        key,
        feature_map=feature_map,
        initial_state=initial_state,
        segmented=documents is not None,
        tiles=tiles,
    )


def _operands(plan: LinearPlan, query, key, value, initial_state, documents):
    initial = None if initial_state is None else pad_state(plan, initial_state.astype(plan.dtype))
    return *(to_columns(plan, x) for x in (query, key, value)), initial, document_rows(plan, documents)
