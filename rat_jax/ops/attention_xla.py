"""Softmax attention in plain XLA, in memory linear in the number of tokens; kernels are compared with it."""

import jax
import jax.numpy as jnp

from rat_jax.mesh import rows_per_device
from rat_jax.ops.attention_types import AttentionOutput, KeyInfo
from rat_jax.segments import whole_rows
from rat_jax.shapes import Array, Bool

_MASKED = -1e30  # finite, so that a row that sees nothing has finite gradients
_MAX_SCORES = 1 << 23  # scores (B N T S) that a device holds at a time: 32 MiB of float32
_MIN_BLOCK = 16  # queries


def attend_whole_rows(query: Array, key: Array, value: Array, window: int | None) -> AttentionOutput:
    """Self-attention of rows that are one document each."""
    info = KeyInfo.of(whole_rows(*query.shape[:2]))
    return attend(query, key, value, info, info, window, aligned=True)


def attend(
    query: Array, key: Array, value: Array, query_info: KeyInfo, key_info: KeyInfo, window: int | None, aligned: bool
) -> AttentionOutput:
    """See `rat_jax.ops.attention.attention`; queries are taken in blocks, whose scores the backward pass remakes."""
    heads = query.shape[2]
    batch, tokens = query.shape[:2]
    keys = key.shape[1]
    block = block_size(batch, heads, tokens, keys if window is None or not aligned else min(keys, window + 1))
    if block == tokens:
        return _attend(query, key, value, visible(query_info, key_info, window))

    span = block + window if aligned and window is not None else keys
    cut_keys = span < keys
    if cut_keys:  # keys in front that nobody sees, so that every block's span lies inside
        key, value, key_info = jax.tree.map(
            lambda x: jnp.pad(x, [(0, 0), (span, 0)] + [(0, 0)] * (x.ndim - 2)), (key, value, key_info)
        )
    tail = [(0, 0), (0, -tokens % block)]
    query = jnp.pad(query, [*tail, (0, 0), (0, 0)])
    query_info = jax.tree.map(lambda x: jnp.pad(x, tail), query_info)
    if cut_keys:  # the last block may reach past the last key
        key, value, key_info = jax.tree.map(
            lambda x: jnp.pad(x, tail + [(0, 0)] * (x.ndim - 2)), (key, value, key_info)
        )

    @jax.checkpoint
    def attend_block(start: Array) -> AttentionOutput:
        def cut(x, first, length):
            return jax.lax.dynamic_slice_in_dim(x, first, length, axis=1)

        block_query, block_query_info = jax.tree.map(lambda x: cut(x, start, block), (query, query_info))
        block_keys = (key, value, key_info)
        if cut_keys:
            first = start + keys - tokens + span - window
            block_keys = jax.tree.map(lambda x: cut(x, first, span), block_keys)
        block_key, block_value, block_key_info = block_keys
        return _attend(block_query, block_key, block_value, visible(block_query_info, block_key_info, window))

    blocks = jax.lax.map(attend_block, jnp.arange(0, tokens, block, dtype=jnp.int32))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1, *x.shape[3:])[:, :tokens], blocks)


def block_size(batch: int, heads: int, tokens: int, keys: int) -> int:
    """Queries whose scores on one device of the mesh in use fit the limit: all of them, or a power of two."""
    rows = rows_per_device(batch) * heads
    if rows * tokens * keys <= _MAX_SCORES:
        return tokens
    limit = max(_MIN_BLOCK, _MAX_SCORES // (rows * keys))
    return min(tokens, 1 << (limit.bit_length() - 1))


def visible(query: KeyInfo, key: KeyInfo, window: int | None) -> Bool[Array, "B T S"]:
    """Which keys each query sees."""
    distance = query.token_index[:, :, None] - key.token_index[:, None, :]
    same = (query.segment_ids[:, :, None] == key.segment_ids[:, None, :]) & (key.segment_ids[:, None, :] != 0)
    seen = same & (distance >= 0)
    return seen if window is None else seen & (distance <= window)


def _attend(query: Array, key: Array, value: Array, visible: Array) -> AttentionOutput:
    batch, tokens, heads, head_dim = query.shape
    key_heads = key.shape[2]
    grouped = query.reshape(batch, tokens, key_heads, heads // key_heads, head_dim)
    scores = jnp.einsum("btkrh,bskh->bkrts", grouped, key, preferred_element_type=jnp.float32)
    visible = visible[:, None, None]
    scores = jnp.where(visible, scores * head_dim**-0.5, _MASKED)
    top = jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True))
    weights = jnp.where(visible, jnp.exp(scores - top), 0.0)
    total = weights.sum(axis=-1, keepdims=True)
    total = jnp.where(total == 0.0, 1.0, total)
    probabilities = (weights / total).astype(value.dtype)
    out = jnp.einsum("bkrts,bskh->btkrh", probabilities, value).reshape(batch, tokens, heads, head_dim)
    log_sum_exp = (top + jnp.log(total))[..., 0]
    return AttentionOutput(out, jnp.moveaxis(log_sum_exp, -1, 1).reshape(batch, tokens, heads))
