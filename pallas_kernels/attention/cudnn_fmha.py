"""cuDNN's fused attention as XLA calls it: the one place that knows the custom calls and their configuration.

`jax.nn.dot_product_attention` makes the same two calls, but rounds the log-sum-exp to the dtype of the values and
keeps the backward call to itself. Here the forward call returns the log-sum-exp in float32, and the backward call takes
any log-sum-exp and output. They are stated through `jax.ffi`, so that tracing and lowering need no GPU.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.attention.shape import AttentionShape

FORWARD = "__cudnn$fmhaSoftmax"
BACKWARD = "__cudnn$fmhaSoftmaxBackward"
DTYPES = {"bfloat16": "BF16", "float16": "F16"}
OLDEST = (8, 0)  # compute capability
HEAD_STEP = 8
MAX_HEAD_DIM = 128  # of every card that cuDNN's fused attention runs on; Hopper and later take 256
MAX_HEADS = 65535
MIN_TOKENS = 2  # "s_q = s_kv = 1 is not supported", says its backward call

_API_VERSION = 2  # what XLA expects of these calls; its configuration is a string
_ROWS_LAST = (0, 2, 1, 3)  # [B, X, T, H] that lies in memory as [B, T, X, H]


def unsupported_reason(shape: AttentionShape) -> str | None:
    """Why cuDNN does not run a call and what comes nearest; None where it does."""
    if not shape.whole_rows:
        return "queries and keys must be known to be the same whole rows: one document each, no padding, no cache"
    if shape.capability is not None and shape.capability < OLDEST:
        major, minor = shape.capability
        return f"it needs a card of compute capability {OLDEST[0]}.{OLDEST[1]} or later, this one has {major}.{minor}"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    head_dim = shape.head_dim
    if head_dim % HEAD_STEP or not 0 < head_dim <= MAX_HEAD_DIM:
        nearest = min(MAX_HEAD_DIM, max(HEAD_STEP, -(-head_dim // HEAD_STEP) * HEAD_STEP))
        return f"head_dim {head_dim} is no multiple of {HEAD_STEP} up to {MAX_HEAD_DIM}; the nearest is {nearest}"
    if shape.num_heads > MAX_HEADS:
        return f"{shape.num_heads} query heads are more than {MAX_HEADS}"
    if shape.tokens < MIN_TOKENS:
        return f"{shape.tokens} queries in a row are too few; the least are {MIN_TOKENS}"
    return None


def forward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """out_t = sum_s p_ts v_s with p_t the softmax over s <= t of scale q_t . k_s, and its natural log-sum-exp.

    Args:
      query: [B, T, X, H]; head x reads key head x // (X / K).
      key, value: [B, S, K, H]; S = T where a query sees earlier keys alone.
      scale: of the scores.
      window: a query sees itself and so many earlier keys; None is all of them.
      causal: False: every query sees all S keys.

    Returns:
      [B, T, X, H] and [B, X, T] float32.
    """
    batch, tokens, heads, head_dim = query.shape
    results = (
        jax.ShapeDtypeStruct((batch, heads, tokens, head_dim), query.dtype),
        jax.ShapeDtypeStruct((batch, heads, tokens), jnp.float32),
        _WORKSPACE,
    )
    products = {"bmm1": _product(3, 3, (0, 2), (0, 2)), "bmm2": _product(3, 1, (0, 1), (0, 2))}
    config = _config(query, key, scale, window, causal, products)
    call = jax.ffi.ffi_call(
        FORWARD,
        results,
        output_layouts=(_ROWS_LAST, (0, 1, 2), (0,)),
        custom_call_api_version=_API_VERSION,
        legacy_backend_config=config,
    )
    out, log_sum_exp, _ = call(query, key, value)
    return _rows_first(out), log_sum_exp


def backward(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    out: jax.Array,
    log_sum_exp: jax.Array,
    d_out: jax.Array,
    *,
    scale: float,
    window: int | None = None,
    causal: bool = True,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The gradients of query, key and value, each in its own shape and dtype.

    With p_ts = exp(scale q_t . k_s - lse_t) and delta_t = sum_h d_out_t out_t, ds_ts = p_ts (d_out_t . v_s - delta_t):
    only those two sums are taken from `out` and `log_sum_exp`, which may therefore be of a softmax over more keys.

    Args:
      query, key, value, scale, window, causal: see `forward`.
      out: [B, T, X, H].
      log_sum_exp: [B, X, T] float32.
      d_out: [B, T, X, H].
    """
    results = tuple(
        jax.ShapeDtypeStruct((x.shape[0], x.shape[2], x.shape[1], x.shape[3]), x.dtype) for x in (query, key, value)
    )
    products = {
        "bmm1_grad_gemm1": _product(2, 1, (0, 1), (0, 2)),
        "bmm1_grad_gemm2": _product(3, 1, (0, 1), (0, 2)),
        "bmm2_grad_gemm1": _product(2, 1, (0, 1), (0, 2)),
        "bmm2_grad_gemm2": _product(3, 3, (0, 2), (0, 2)),
    }
    config = _config(query, key, scale, window, causal, products)
    call = jax.ffi.ffi_call(
        BACKWARD,
        (*results, _WORKSPACE),
        output_layouts=(_ROWS_LAST, _ROWS_LAST, _ROWS_LAST, (0,)),
        custom_call_api_version=_API_VERSION,
        legacy_backend_config=config,
    )
    d_query, d_key, d_value, _ = call(query, key, value, log_sum_exp, d_out, out)
    return _rows_first(d_query), _rows_first(d_key), _rows_first(d_value)


_WORKSPACE = jax.ShapeDtypeStruct((0,), jnp.uint8)  # XLA gives it the size that cuDNN asks for


def _rows_first(x: jax.Array) -> jax.Array:
    return jnp.transpose(x, _ROWS_LAST)


def _config(query, key, scale: float, window: int | None, causal: bool, products: dict[str, Any]) -> str:
    """XLA's `CudnnfMHABackendConfig` as JSON."""
    batch, tokens, heads, _ = query.shape
    scores = {
        "element_type": DTYPES[query.dtype.name],
        "dimensions": [str(size) for size in (batch, heads, tokens, key.shape[1])],
        "layout": {"minor_to_major": ["3", "2", "1", "0"]},
        "is_dynamic_dimension": [False] * 4,
    }
    attention = {
        "algorithm": {
            "algo_id": "0",
            "math_type": "TENSOR_OP_MATH",
            "tuning_knobs": {"17": "1", "24": "0"},  # as XLA's own front end sets them
            "is_cudnn_frontend": True,
            "workspace_size": "0",
        },
        "fmha_scale": scale,
        "intermediate_tensor_shape": scores,
        "is_flash_attention": True,
        "mask_type": "CAUSAL" if causal else "NO_MASK",
        "dropout_rate": 0.0,
        "seed": 0,
        "sliding_window_length": 0 if window is None else window + 1,  # the query itself is counted; 0 is none
        "max_seg_per_batch": 1,
        "is_paged_attention": False,
    } | {f"{name}_dot_dimension_numbers": numbers for name, numbers in products.items()}
    return json.dumps({"operation_queue_id": "0", "cudnn_fmha_backend_config": attention})


def _product(left: int, right: int, left_batch: tuple[int, ...], right_batch: tuple[int, ...]) -> dict[str, list[str]]:
    return {
        "lhs_contracting_dimensions": [str(left)],
        "rhs_contracting_dimensions": [str(right)],
        "lhs_batch_dimensions": [str(axis) for axis in left_batch],
        "rhs_batch_dimensions": [str(axis) for axis in right_batch],
    }
