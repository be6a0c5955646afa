"""RAT's attention to the summaries of earlier chunks as causal grouped-query attention over chunks, by cuDNN.

All L queries of chunk c see the summaries 0 .. c - 1. Folded into the head axis, the queries of chunks 1, 2, ... are
[B, C - 1, N L, H], the summaries 0 .. C - 2 are [B, C - 1, N, H], head n L + l reads summary head n, and the mask is
the plain causal one. The current pair joins the softmax by the log-sum-exps, in powers of two as everywhere in the op:

    lse = log2(2^own + 2^earlier),   o = p v~ + (1 - p) o_earlier,   p = 2^(own - lse),   out = sigmoid(z) o.

Backward, cuDNN is given the lse of the whole softmax and some o' with do . o' = do . o = delta, which is all that it
takes from an output. o' = (delta / |do|^2) do is the part of o along do: it is made from what is at hand, and rounding
its channels to 16 bits hardly moves the sum, because all terms of do . o' have one sign.

Arguments and results are those of the Triton kernels in this folder, but that `backward` reads the running
values too: cuDNN does not return the sums of the scores' gradients, so the current score's comes from its value,
ds_t = p (do . v~ - delta).
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention import cudnn_fmha
from pallas_kernels.attention.shape import AttentionShape
from pallas_kernels.rat.shape import RatShape

_LN_2 = math.log(2)


def unsupported_reason(shape: RatShape) -> str | None:
    """Why cuDNN cannot run the attention of a call and what comes nearest; None where it can."""
    if shape.segmented or shape.continued:
        return "it takes neither packed documents nor a state; implementation 'triton' does"
    if shape.num_chunks <= cudnn_fmha.MIN_TOKENS:
        min_tokens = cudnn_fmha.MIN_TOKENS * shape.chunk_size + 1
        return f"{shape.tokens} tokens are too few chunks with earlier ones; the least are {min_tokens}"
    return cudnn_fmha.unsupported_reason(
        AttentionShape(
            shape.batch,
            shape.num_chunks - 1,
            shape.num_heads * shape.chunk_size,
            shape.num_heads,
            shape.head_dim,
            shape.dtype,
            capability=shape.capability,
        )
    )


def forward(
    shape: RatShape,
    projected: jax.Array,
    running_values: jax.Array,
    current_scores: jax.Array,
    rotated_queries: jax.Array,
    summary_keys: jax.Array,
    summary_values: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The mixed output [B, T, D] and lse [B, N, T] float32.

    Args:
      shape: sizes for which `unsupported_reason` has no reason.
      projected: [B, T, 3 D + 2 G H], of which z is read.
      running_values: [B, T, N, H], v~.
      current_scores: [B, N, T] float32, in powers of two.
      rotated_queries: [B, T, G, H]; with a summary they give the score in powers of two.
      summary_keys, summary_values: [B, C, N, H].
    """
    earlier, log_sum_exp = cudnn_fmha.forward(
        _fold_queries(shape, rotated_queries), *_earlier(summary_keys, summary_values), scale=_LN_2
    )
    log_sum_exp = _unfold_sums(shape, log_sum_exp / _LN_2, -jnp.inf)
    lse = jnp.logaddexp2(current_scores, log_sum_exp)
    weight = jnp.exp2(current_scores - lse).transpose(0, 2, 1)[..., None]
    own = weight * running_values.astype(jnp.float32)
    mixed = own + (1.0 - weight) * _unfold(shape, earlier).astype(jnp.float32)
    z = projected[..., : shape.width].astype(jnp.float32)
    out = jax.nn.sigmoid(z) * mixed.reshape(shape.batch, shape.tokens, shape.width)
    return out.astype(projected.dtype), lse


def backward(
    shape: RatShape,
    d_heads: jax.Array,
    delta: jax.Array,
    lse: jax.Array,
    rotated_queries: jax.Array,
    summary_keys: jax.Array,
    summary_values: jax.Array,
    current_scores: jax.Array,
    running_values: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, current-token scores and summaries, and the weights of the current pairs.

    Args:
      shape: sizes for which `unsupported_reason` has no reason.
      d_heads: [B, T, N, H], do.
      delta: [B, N, T] float32, do . o.
      lse: [B, N, T] float32, as `forward` returns it.
      rotated_queries, summary_keys, summary_values, current_scores, running_values: as of `forward`.

    Returns:
      d_rotated_queries [B, T, G, H], of the unscaled rotated queries, d_current_scores [B, N, T], of the scores in
      natural units, times 1 / sqrt(H), current_weights [B, N, T], d_summary_keys and d_summary_values [B, C, N, H]; all
      float32.
    """
    wide = d_heads.astype(jnp.float32)
    norms = jnp.sum(wide * wide, axis=-1)
    current_products = jnp.sum(wide * running_values.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
    parallel = jnp.where(norms > 0, delta.transpose(0, 2, 1) / jnp.where(norms > 0, norms, 1.0), 0.0)
    out = (parallel[..., None] * wide).astype(d_heads.dtype)
    d_queries, d_keys, d_values = cudnn_fmha.backward(
        _fold_queries(shape, rotated_queries),
        *_earlier(summary_keys, summary_values),
        _fold(shape, out),
        _fold_sums(shape, lse * _LN_2),
        _fold(shape, d_heads),
        scale=_LN_2,
    )
    scale = 1 / math.sqrt(shape.head_dim)
    current_weights = jnp.exp2(current_scores - lse)
    d_current_scores = current_weights * (current_products - delta) * scale
    grouped = _unfold(shape, d_queries).astype(jnp.float32)
    grouped = grouped.reshape(shape.batch, shape.tokens, shape.heads_per_group, shape.num_groups, shape.head_dim)
    d_rotated_queries = grouped.sum(axis=2) * (scale / _LN_2)
    # The last slot has no later chunk.
    d_keys, d_values = (jnp.pad(x.astype(jnp.float32), _LAST_SLOT) for x in (d_keys, d_values))
    return d_rotated_queries, d_current_scores, current_weights, d_keys, d_values


_LAST_SLOT = ((0, 0), (0, 1), (0, 0), (0, 0))


def _earlier(summary_keys: jax.Array, summary_values: jax.Array) -> tuple[jax.Array, jax.Array]:
    return summary_keys[:, :-1], summary_values[:, :-1]


def _fold(shape: RatShape, x: jax.Array) -> jax.Array:
    """[B, T, N, H] without its first chunk as [B, C - 1, N L, H]; the tokens that the last chunk lacks are zero."""
    missing = shape.num_chunks * shape.chunk_size - shape.tokens
    x = jnp.pad(x[:, shape.chunk_size :], ((0, 0), (0, missing), (0, 0), (0, 0)))
    x = x.reshape(shape.batch, shape.num_chunks - 1, shape.chunk_size, shape.num_heads, shape.head_dim)
    return x.transpose(0, 1, 3, 2, 4).reshape(
        shape.batch, shape.num_chunks - 1, shape.num_heads * shape.chunk_size, shape.head_dim
    )


def _fold_queries(shape: RatShape, rotated_queries: jax.Array) -> jax.Array:
    """Queries of groups for every head, folded: head n has those of group n mod G."""
    heads = (shape.batch, shape.tokens, shape.heads_per_group, shape.num_groups, shape.head_dim)
    queries = jnp.broadcast_to(rotated_queries[:, :, None], heads)
    return _fold(shape, queries.reshape(shape.batch, shape.tokens, shape.num_heads, shape.head_dim))


def _unfold(shape: RatShape, x: jax.Array) -> jax.Array:
    """The inverse of `_fold`, zero in the first chunk."""
    x = x.reshape(shape.batch, shape.num_chunks - 1, shape.num_heads, shape.chunk_size, shape.head_dim).transpose(
        0, 1, 3, 2, 4
    )
    x = x.reshape(shape.batch, (shape.num_chunks - 1) * shape.chunk_size, shape.num_heads, shape.head_dim)
    return jnp.pad(x, ((0, 0), (shape.chunk_size, 0), (0, 0), (0, 0)))[:, : shape.tokens]


def _fold_sums(shape: RatShape, x: jax.Array) -> jax.Array:
    """[B, N, T] without its first chunk as [B, N L, C - 1]."""
    missing = shape.num_chunks * shape.chunk_size - shape.tokens
    x = jnp.pad(x[:, :, shape.chunk_size :], ((0, 0), (0, 0), (0, missing)))
    x = x.reshape(shape.batch, shape.num_heads, shape.num_chunks - 1, shape.chunk_size).transpose(0, 1, 3, 2)
    return x.reshape(shape.batch, shape.num_heads * shape.chunk_size, shape.num_chunks - 1)


def _unfold_sums(shape: RatShape, x: jax.Array, first: float) -> jax.Array:
    """The inverse of `_fold_sums`, `first` in the first chunk."""
    x = x.reshape(shape.batch, shape.num_heads, shape.chunk_size, shape.num_chunks - 1).transpose(0, 1, 3, 2)
    x = x.reshape(shape.batch, shape.num_heads, (shape.num_chunks - 1) * shape.chunk_size)
    return jnp.pad(x, ((0, 0), (0, 0), (shape.chunk_size, 0)), constant_values=first)[:, :, : shape.tokens]
