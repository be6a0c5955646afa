"""Softmax attention of tokens to earlier keys, and its share of gradients of a softmax over more keys.

Plain XLA in blocks of queries, in memory linear in queries and keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.ops.attention_types import KeyInfo
from rat_jax.shapes import Array, Float, Float32

MASKED = -1e30  # log-sum-exp where no key is seen; finite, so that results are
_MAX_SCORES = 1 << 25  # held at a time: 128 MiB of float32


class Attended(NamedTuple):
    """What a query read; 0 where it sees no key, and then the log-sum-exp is very negative."""

    out: Float32[Array, "B T N H"]
    log_sum_exp: Float32[Array, "B N T"]  # of q . k / sqrt(H)

    @classmethod
    def nothing(cls, query: Float[Array, "B T N H"]) -> "Attended":
        """Of no keys."""
        batch, tokens, heads, _ = query.shape
        return cls(jnp.zeros(query.shape, jnp.float32), jnp.full((batch, heads, tokens), MASKED, jnp.float32))


class Gradients(NamedTuple):
    """Through the scores of these keys alone."""

    d_query: Float32[Array, "B T N H"]
    d_key: Float32[Array, "B S K H"]
    d_value: Float32[Array, "B S K H"]


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_info: KeyInfo,
    key_info: KeyInfo,
    window: int | None = None,
) -> Attended:
    """out_t = sum_s p_ts v_s, p_t = softmax of q_t . k_s / sqrt(H) over the visible s.

    Args:
      query, key, value: q, k, v; head n reads key head n // (N / K).
      query_info, key_info: of tokens; visible to t are keys of its document whose index is not after its own.
      window: and at most so many before it; None: all of them.
    """

    def of_block(_, query: Array, info: KeyInfo) -> tuple[None, tuple[Array, Array]]:
        scores = _scores(query, key, info, key_info, window)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.where(scores > MASKED, jnp.exp(scores - top), 0.0)
        total = weights.sum(axis=-1)
        out = _product("bkrts,bskh->btkrh", weights.astype(value.dtype), value)
        out /= _tokens_first(jnp.where(total > 0, total, 1.0))[..., None]
        return None, (out, _tokens_first(jnp.where(total > 0, top[..., 0] + jnp.log(total), MASKED)))

    grouped = _grouped(query, key)
    _, (out, log_sum_exp) = _scan_blocks(of_block, None, key, grouped, query_info)
    return Attended(out.reshape(query.shape), log_sum_exp.reshape(query.shape[:3]).transpose(0, 2, 1))


def join(first: Attended, second: Attended) -> Attended:
    """The softmax over the keys of both, which have none in common."""
    total = jnp.logaddexp(first.log_sum_exp, second.log_sum_exp)
    shares = (jnp.exp(x.log_sum_exp - total).transpose(0, 2, 1)[..., None] for x in (first, second))
    return Attended(sum(share * x.out for share, x in zip(shares, (first, second), strict=True)), total)


def gradients(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    query_info: KeyInfo,
    key_info: KeyInfo,
    log_sum_exp: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
    window: int | None = None,
) -> Gradients:
    """The share of these keys in the gradients of a softmax that may be over more of them.

    With p_ts = exp(q_t . k_s / sqrt(H) - lse_t), ds_ts = p_ts (d_out_t . v_s - delta_t).

    Args:
      query, key, value, query_info, key_info, window: see `attend`.
      log_sum_exp: lse, of all keys.
      delta: sum over the channels of d_out_t times the output over all keys.
      d_out: of that output.
    """
    scale = query.shape[-1] ** -0.5

    def add_block(sums, query: Array, info: KeyInfo, lse: Array, delta: Array, d_out: Array):
        scores = _scores(query, key, info, key_info, window)
        weights = jnp.where(scores > MASKED, jnp.exp(scores - _tokens_last(lse)[..., None]), 0.0)
        d_weights = _product("btkrh,bskh->bkrts", d_out, value)
        d_scores = weights * (d_weights - _tokens_last(delta)[..., None])
        scaled = (d_scores * scale).astype(query.dtype)
        d_query = _product("bkrts,bskh->btkrh", scaled, key)
        d_key = sums[0] + _product("bkrts,btkrh->bskh", scaled, query)
        d_value = sums[1] + _product("bkrts,btkrh->bskh", weights.astype(d_out.dtype), d_out)
        return (d_key, d_value), d_query

    zeros = jnp.zeros(key.shape, jnp.float32)
    by_heads = (_grouped(x.transpose(0, 2, 1), key) for x in (log_sum_exp, delta))
    rows = (_grouped(query, key), query_info, *by_heads, _grouped(d_out, key))
    (d_key, d_value), d_query = _scan_blocks(add_block, (zeros, zeros), key, *rows)
    return Gradients(d_query.reshape(query.shape), d_key, d_value)


def summed_score_gradients(
    read: Attended, log_sum_exp: Float32[Array, "B N T"], delta: Float32[Array, "B N T"], d_out: Float[Array, "B T N H"]
) -> Float32[Array, "B N T"]:
    """sum_s ds_ts over some of the keys of a softmax, from what of these alone is read: see `gradients`."""
    product = (d_out.astype(jnp.float32) * read.out.astype(jnp.float32)).sum(axis=-1).transpose(0, 2, 1)
    return jnp.exp(read.log_sum_exp - log_sum_exp) * (product - delta)


def _grouped(x: Array, key: Array) -> Array:
    """[B, T, N, ...] as [B, T, K, N / K, ...]."""
    return x.reshape(*x.shape[:2], key.shape[2], -1, *x.shape[3:])


def _tokens_first(x: Float32[Array, "B K R T"]) -> Float32[Array, "B T K R"]:
    return jnp.moveaxis(x, 3, 1)


def _tokens_last(x: Float32[Array, "B T K R"]) -> Float32[Array, "B K R T"]:
    return jnp.moveaxis(x, 1, 3)


def _scores(
    query: Float[Array, "B T K R H"], key: Float[Array, "B S K H"], info: KeyInfo, key_info: KeyInfo, window: int | None
) -> Float32[Array, "B K R T S"]:
    ids, key_ids = info.segment_ids[:, :, None], key_info.segment_ids[:, None, :]
    distance = info.token_index[:, :, None] - key_info.token_index[:, None, :]
    visible = (ids == key_ids) & (key_ids != 0) & (distance >= 0)
    if window is not None:
        visible &= distance <= window
    scores = _product("btkrh,bskh->bkrts", query, key) * query.shape[-1] ** -0.5
    return jnp.where(visible[:, None, None], scores, MASKED)


def _scan_blocks(function, carry, key: Array, *rows):
    """Scans blocks of tokens, whose scores to all keys are held at a time; padding is of document 0."""
    batch, tokens, key_heads, shared, _ = rows[0].shape
    block = min(tokens, max(1, _MAX_SCORES // (batch * key_heads * shared * key.shape[1])))
    count = -(-tokens // block)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * block - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, block, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(batch, count * block, *x.shape[3:])[:, :tokens]

    carry, blocks = jax.lax.scan(lambda carry, block: function(carry, *block), carry, jax.tree.map(cut, rows))
    return carry, jax.tree.map(join, blocks)


def _product(equation: str, left: Array, right: Array) -> Float32[Array, "..."]:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
