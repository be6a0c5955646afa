"""Attention of tokens to keys that all come before them, by kernels or in plain XLA, and its share of gradients.

The functions are those of `rat_jax.ops.document_attention`, which is the plain XLA.
"""

from typing import Literal

import jax.numpy as jnp

from pallas_kernels.attention import cudnn_fmha
from rat_jax.ops import document_attention
from rat_jax.ops.attention_types import KeyInfo
from rat_jax.ops.document_attention import Attended, Gradients
from rat_jax.shapes import Array, Float, Float32

# "cudnn" is of rows that are one document each, and looks at no information of tokens.
Implementation = Literal["cudnn", "pallas_tpu", "xla"]


def attend(
    implementation: Implementation,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_info: KeyInfo | None,
    key_info: KeyInfo | None,
) -> Attended:
    """As `document_attention.attend`, of keys that come before all queries."""
    match implementation:
        case "cudnn":
            out, log_sum_exp = cudnn_fmha.forward(query, key, value, scale=_scale(query), causal=False)
        case "pallas_tpu":
            from pallas_kernels.attention import tpu_splash  # imports Pallas, which takes a while

            options = {"scale": _scale(query), "key_documents": key_info.segment_ids}
            out, log_sum_exp = tpu_splash.forward(query, key, value, query_info.segment_ids, **options)
            log_sum_exp = log_sum_exp.transpose(0, 2, 1)
        case "xla":
            return document_attention.attend(query, key, value, query_info, key_info)
    return Attended(out.astype(jnp.float32), log_sum_exp)


def gradients(
    implementation: Implementation,
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_info: KeyInfo | None,
    key_info: KeyInfo | None,
    log_sum_exp: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> Gradients:
    """As `document_attention.gradients`, of keys that come before all queries."""
    arrays = query, key, value
    match implementation:
        case "cudnn":
            given = _output_of(delta, d_out), log_sum_exp, d_out
            found = cudnn_fmha.backward(*arrays, *given, scale=_scale(query), causal=False)
        case "pallas_tpu":
            from pallas_kernels.attention import tpu_splash

            given = _output_of(delta, d_out), log_sum_exp.transpose(0, 2, 1), d_out
            options = {"scale": _scale(query), "key_documents": key_info.segment_ids}
            found = tpu_splash.backward(*arrays, query_info.segment_ids, *given, **options)
        case "xla":
            rows = query_info, key_info, log_sum_exp, delta, d_out
            found = document_attention.gradients(*arrays, *rows)
    return Gradients(*(x.astype(jnp.float32) for x in found))


def _output_of(delta: Array, d_out: Array) -> Array:
    """What stands for the output: kernels take its product with d_out alone, which is delta for this multiple of it."""
    wide = d_out.astype(jnp.float32)
    norms = jnp.sum(wide * wide, axis=-1)
    multiple = jnp.where(norms > 0, delta.transpose(0, 2, 1) / jnp.where(norms > 0, norms, 1.0), 0.0)
    return (multiple[..., None] * wide).astype(d_out.dtype)


def _scale(query: Array) -> float:
    return query.shape[-1] ** -0.5
