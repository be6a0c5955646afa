"""RAT's attention to the summaries of earlier chunks as causal grouped-query attention over chunks, by cuDNN.

All L queries of chunk c see the summaries 0 .. c - 1. Folded into the head axis, the queries of chunks 1, 2, ... are
[B, C - 1, N L, H], the summaries 0 .. C - 2 are [B, C - 1, N, H], head n L + l reads summary head n, and the mask is
the plain causal one. The own pair joins the softmax by the log-sum-exps, in powers of two as everywhere in the op:

    lse = log2(2^own + 2^earlier),   o = p v~ + (1 - p) o_earlier,   p = 2^(own - lse),   out = sigmoid(z) o.

Backward, cuDNN is given the lse of the whole softmax and some o' with do . o' = do . o = delta, which is all that it
takes from an output. o' = (delta / |do|^2) do is the part of o along do: it is made from what is at hand, and rounding
its channels to 16 bits hardly moves the sum, because all terms of do . o' have one sign.

Arguments and results are those of the Triton kernels in `pallas_kernels.triton`, but that `backward` reads the running
values too: cuDNN does not return the sums of the scores' gradients, so the own score's comes from its own value,
ds_t = p (do . v~ - delta).
"""

import math

import jax
import jax.numpy as jnp

from pallas_kernels.attention import cudnn_fmha
from pallas_kernels.rat.shape import Problem

_LN_2 = math.log(2)


def refusal(p: Problem) -> str | None:
    """Why cuDNN cannot run this problem and what comes nearest, or None where it can."""
    if p.segmented or p.continued:
        return "packed or continued rows: chunks must begin at multiples of chunk_size in every row"
    if p.num_heads % p.num_groups:
        return f"num_heads must be a multiple of num_groups, got {p.num_heads} and {p.num_groups}"
    if p.slots <= cudnn_fmha.MIN_TOKENS:
        least = cudnn_fmha.MIN_TOKENS * p.chunk_size + 1
        return f"{p.tokens} tokens are too few chunks with earlier ones; the least are {least}"
    return cudnn_fmha.refusal(p.dtype, p.slots - 1, p.num_heads * p.chunk_size, p.head_dim)


def forward(
    p: Problem,
    projected: jax.Array,
    running_values: jax.Array,
    own_scores: jax.Array,
    rotated_queries: jax.Array,
    summary_keys: jax.Array,
    summary_values: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The mixed output [B, T, D] and lse [B, N, T] float32.

    Args:
      p: sizes for which `refusal` has no reason.
      projected: [B, T, 3 D + 2 G H], of which z is read.
      running_values: [B, T, N, H], v~.
      own_scores: [B, N, T] float32, in powers of two.
      rotated_queries: [B, T, G, H]; with a summary they give the score in powers of two.
      summary_keys, summary_values: [B, C, N, H].
    """
    earlier, log_sum_exp = cudnn_fmha.forward(
        _fold_queries(p, rotated_queries), *_earlier(summary_keys, summary_values), scale=_LN_2
    )
    log_sum_exp = _unfold_sums(p, log_sum_exp / _LN_2, -jnp.inf)
    lse = jnp.logaddexp2(own_scores, log_sum_exp)
    weight = jnp.exp2(own_scores - lse).transpose(0, 2, 1)[..., None]
    own = weight * running_values.astype(jnp.float32)
    mixed = own + (1.0 - weight) * _unfold(p, earlier).astype(jnp.float32)
    z = projected[..., : p.width].astype(jnp.float32)
    out = jax.nn.sigmoid(z) * mixed.reshape(p.batch, p.tokens, p.width)
    return out.astype(projected.dtype), lse


def backward(
    p: Problem,
    d_heads: jax.Array,
    delta: jax.Array,
    lse: jax.Array,
    rotated_queries: jax.Array,
    summary_keys: jax.Array,
    summary_values: jax.Array,
    own_scores: jax.Array,
    running_values: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """The gradients of queries, own scores and summaries, and the weights of the own pairs.

    Args:
      p: sizes for which `refusal` has no reason.
      d_heads: [B, T, N, H], do.
      delta: [B, N, T] float32, do . o.
      lse: [B, N, T] float32, as `forward` returns it.
      rotated_queries, summary_keys, summary_values, own_scores, running_values: as of `forward`.

    Returns:
      d_rotated_queries [B, T, G, H], of the unscaled rotated queries, d_own_scores [B, N, T], of the scores in natural
      units, times 1 / sqrt(H), own_weights [B, N, T], d_summary_keys and d_summary_values [B, C, N, H]; all float32.
    """
    wide = d_heads.astype(jnp.float32)
    norms = jnp.sum(wide * wide, axis=-1)
    own_products = jnp.sum(wide * running_values.astype(jnp.float32), axis=-1).transpose(0, 2, 1)
    parallel = jnp.where(norms > 0, delta.transpose(0, 2, 1) / jnp.where(norms > 0, norms, 1.0), 0.0)
    out = (parallel[..., None] * wide).astype(d_heads.dtype)
    d_queries, d_keys, d_values = cudnn_fmha.backward(
        _fold_queries(p, rotated_queries),
        *_earlier(summary_keys, summary_values),
        _fold(p, out),
        _fold_sums(p, lse * _LN_2),
        _fold(p, d_heads),
        scale=_LN_2,
    )
    scale = 1 / math.sqrt(p.head_dim)
    own_weights = jnp.exp2(own_scores - lse)
    d_own_scores = own_weights * (own_products - delta) * scale
    grouped = _unfold(p, d_queries).astype(jnp.float32)
    grouped = grouped.reshape(p.batch, p.tokens, p.heads_per_group, p.num_groups, p.head_dim)
    d_rotated_queries = grouped.sum(axis=2) * (scale / _LN_2)
    # The last slot has no later chunk.
    d_keys, d_values = (jnp.pad(x.astype(jnp.float32), _LAST_SLOT) for x in (d_keys, d_values))
    return d_rotated_queries, d_own_scores, own_weights, d_keys, d_values


_LAST_SLOT = ((0, 0), (0, 1), (0, 0), (0, 0))


def _earlier(summary_keys: jax.Array, summary_values: jax.Array) -> tuple[jax.Array, jax.Array]:
    return summary_keys[:, :-1], summary_values[:, :-1]


def _fold(p: Problem, x: jax.Array) -> jax.Array:
    """[B, T, N, H] without its first chunk as [B, C - 1, N L, H]; the tokens that the last chunk lacks are zero."""
    missing = p.slots * p.chunk_size - p.tokens
    x = jnp.pad(x[:, p.chunk_size :], ((0, 0), (0, missing), (0, 0), (0, 0)))
    x = x.reshape(p.batch, p.slots - 1, p.chunk_size, p.num_heads, p.head_dim)
    return x.transpose(0, 1, 3, 2, 4).reshape(p.batch, p.slots - 1, p.num_heads * p.chunk_size, p.head_dim)


def _fold_queries(p: Problem, rotated_queries: jax.Array) -> jax.Array:
    """Queries of groups for every head, folded: head n has those of group n mod G."""
    shape = (p.batch, p.tokens, p.heads_per_group, p.num_groups, p.head_dim)
    queries = jnp.broadcast_to(rotated_queries[:, :, None], shape)
    return _fold(p, queries.reshape(p.batch, p.tokens, p.num_heads, p.head_dim))


def _unfold(p: Problem, x: jax.Array) -> jax.Array:
    """The inverse of `_fold`, zero in the first chunk."""
    x = x.reshape(p.batch, p.slots - 1, p.num_heads, p.chunk_size, p.head_dim).transpose(0, 1, 3, 2, 4)
    x = x.reshape(p.batch, (p.slots - 1) * p.chunk_size, p.num_heads, p.head_dim)
    return jnp.pad(x, ((0, 0), (p.chunk_size, 0), (0, 0), (0, 0)))[:, : p.tokens]


def _fold_sums(p: Problem, x: jax.Array) -> jax.Array:
    """[B, N, T] without its first chunk as [B, N L, C - 1]."""
    missing = p.slots * p.chunk_size - p.tokens
    x = jnp.pad(x[:, :, p.chunk_size :], ((0, 0), (0, 0), (0, missing)))
    x = x.reshape(p.batch, p.num_heads, p.slots - 1, p.chunk_size).transpose(0, 1, 3, 2)
    return x.reshape(p.batch, p.num_heads * p.chunk_size, p.slots - 1)


def _unfold_sums(p: Problem, x: jax.Array, first: float) -> jax.Array:
    """The inverse of `_fold_sums`, `first` in the first chunk."""
    x = x.reshape(p.batch, p.num_heads, p.chunk_size, p.slots - 1).transpose(0, 1, 3, 2)
    x = x.reshape(p.batch, p.num_heads, (p.slots - 1) * p.chunk_size)
    return jnp.pad(x, ((0, 0), (0, 0), (p.chunk_size, 0)), constant_values=first)[:, :, : p.tokens]
