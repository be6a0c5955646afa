"""Softmax attention of tokens to all keys of their document, and its share of gradients of a softmax over more keys.

Plain XLA in blocks of queries, in memory linear in queries and keys.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.shapes import Array, Float, Float32, Int

_MASKED = -1e30  # finite, so that queries that see nothing have finite results
_MAX_SCORES = 1 << 25  # held at a time: 128 MiB of float32


class Attended(NamedTuple):
    """What a query read; 0 where it sees no key, and then the log-sum-exp is very negative."""

    out: Float32[Array, "B T N H"]
    log_sum_exp: Float32[Array, "B N T"]  # of q . k / sqrt(H)


class ScoreGradients(NamedTuple):
    """Through the scores of these keys alone."""

    d_query: Float32[Array, "B T N H"]
    d_key: Float32[Array, "B S N H"]
    d_value: Float32[Array, "B S N H"]
    d_scores: Float32[Array, "B N T"]  # summed over the keys


def attend(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B S"],
) -> Attended:
    """out_t = sum_s p_ts v_s, p_t = softmax of q_t . k_s / sqrt(H) over the s of t's document, which is not 0."""

    def of_block(query: Array, ids: Array) -> Attended:
        scores = _scores(query, key, ids, key_ids)
        top = scores.max(axis=-1, keepdims=True)
        weights = jnp.where(scores > _MASKED, jnp.exp(scores - top), 0.0)
        total = weights.sum(axis=-1)
        out = _product("bnts,bsnh->btnh", weights.astype(value.dtype), value)
        out /= jnp.where(total > 0, total, 1.0).transpose(0, 2, 1)[..., None]
        # Along the tokens first, as blocks are joined.
        return Attended(out, jnp.where(total > 0, top[..., 0] + jnp.log(total), _MASKED).transpose(0, 2, 1))

    found = _by_blocks(of_block, key, query, query_ids)
    return Attended(found.out, found.log_sum_exp.transpose(0, 2, 1))


def score_gradients(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S N H"],
    value: Float[Array, "B S N H"],
    query_ids: Int[Array, "B T"],
    key_ids: Int[Array, "B S"],
    log_sum_exp: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> ScoreGradients:
    """The share of these keys in the gradients of a softmax that may be over more of them.

    With p_ts = exp(q_t . k_s / sqrt(H) - lse_t), ds_ts = p_ts (d_out_t . v_s - delta_t).

    Args:
      query, key, value, query_ids, key_ids: see `attend`.
      log_sum_exp: lse, of all keys.
      delta: sum over the channels of d_out_t times the output over all keys.
      d_out: of that output.
    """
    scale = query.shape[-1] ** -0.5

    def add_block(sums, query: Array, ids: Array, lse: Array, delta: Array, d_out: Array):
        scores = _scores(query, key, ids, key_ids)
        weights = jnp.where(scores > _MASKED, jnp.exp(scores - lse.transpose(0, 2, 1)[..., None]), 0.0)
        d_weights = _product("btnh,bsnh->bnts", d_out, value)
        d_scores = weights * (d_weights - delta.transpose(0, 2, 1)[..., None])
        scaled = (d_scores * scale).astype(query.dtype)
        d_query = _product("bnts,bsnh->btnh", scaled, key)
        d_key = sums[0] + _product("bnts,btnh->bsnh", scaled, query)
        d_value = sums[1] + _product("bnts,btnh->bsnh", weights.astype(d_out.dtype), d_out)
        return (d_key, d_value), (d_query, d_scores.sum(axis=-1).transpose(0, 2, 1))

    zeros = jnp.zeros(key.shape, jnp.float32)
    rows = (query, query_ids, log_sum_exp.transpose(0, 2, 1), delta.transpose(0, 2, 1), d_out)
    (d_key, d_value), (d_query, d_scores) = _scan_blocks(add_block, (zeros, zeros), key, *rows)
    return ScoreGradients(d_query, d_key, d_value, d_scores.transpose(0, 2, 1))


def _scores(query: Array, key: Array, query_ids: Array, key_ids: Array) -> Float32[Array, "B N T S"]:
    visible = (query_ids[:, :, None] == key_ids[:, None, :]) & (key_ids[:, None, :] != 0)
    scores = _product("btnh,bsnh->bnts", query, key) * query.shape[-1] ** -0.5
    return jnp.where(visible[:, None], scores, _MASKED)


def _by_blocks(function: Callable[..., Attended], key: Array, *rows: Array) -> Attended:
    return _scan_blocks(lambda nothing, *block: (nothing, function(*block)), (), key, *rows)[1]


def _scan_blocks(function, carry, key: Array, *rows: Array):
    """Scans blocks of tokens, whose scores to all keys are held at a time; padding is of document 0."""
    batch, tokens, heads, _ = rows[0].shape
    block = min(tokens, max(1, _MAX_SCORES // (batch * heads * key.shape[1])))
    count = -(-tokens // block)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, count * block - tokens)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(batch, count, block, *x.shape[2:]), 1, 0)

    def join(x: Array) -> Array:
        x = jnp.moveaxis(x, 0, 1)
        return x.reshape(batch, count * block, *x.shape[3:])[:, :tokens]

    carry, blocks = jax.lax.scan(lambda carry, block: function(carry, *block), carry, tuple(map(cut, rows)))
    return carry, jax.tree.map(join, blocks)


def _product(equation: str, left: Array, right: Array) -> Float32[Array, "..."]:
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.float32)
