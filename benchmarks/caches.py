"""Caches in the middle of a row, without reading the tokens that would lead there."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from rat_jax.mixers.attention import AttentionCache
from rat_jax.mixers.local_attention import LocalAttentionCache
from rat_jax.mixers.rattention import RattentionCache
from rat_jax.mixers.rnn import RnnCache
from rat_jax.model import ModelCache
from rat_jax.ops.rat_types import RatState
from rat_jax.segments import StreamState
from rat_jax.shapes import Array

_Cache = ModelCache | AttentionCache | LocalAttentionCache | RattentionCache | RnnCache | RatState


def random_contents(shapes: _Cache) -> _Cache:
    """A cache of these shapes: random numbers, the same in every batch row, and zeros for integers."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [_random(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)])


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))  # one program for all layers
def _random(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return jnp.broadcast_to(jax.random.normal(key, (1, *shape[1:]), dtype), shape)


def at_position(cache: _Cache, position: Array, chunk_size: int) -> _Cache:
    """The cache of rows that have read `position` tokens of one document; its numbers stay what they are."""

    def filled(segment_ids, count):
        return jnp.broadcast_to((jnp.arange(segment_ids.shape[1]) < count)[None], segment_ids.shape).astype(jnp.int32)

    match cache:
        case ModelCache():
            ones = jnp.ones_like(cache.end.position)
            end = StreamState(segment_id=ones, num_documents=ones, position=position * ones, num_tokens=position * ones)
            return ModelCache(tuple(at_position(layer, position, chunk_size) for layer in cache.layers), end)
        case AttentionCache():
            return dataclasses.replace(cache, segment_ids=filled(cache.segment_ids, position))
        case LocalAttentionCache():
            size = cache.token_index.shape[1]
            slots = jnp.arange(size)
            order = position - 1 - (position - 1 - slots) % size  # the last token before `position` of each slot
            order = jnp.broadcast_to(order[None], cache.token_index.shape).astype(jnp.int32)
            return dataclasses.replace(cache, segment_ids=(order >= 0).astype(jnp.int32), token_index=order)
        case RatState():
            count = position // chunk_size
            return dataclasses.replace(
                cache,
                summary_segment_ids=filled(cache.summary_segment_ids, count),
                num_summaries=count * jnp.ones_like(cache.num_summaries),
            )
        case RattentionCache():
            return dataclasses.replace(cache, ring=at_position(cache.ring, position, chunk_size))
        case RnnCache():
            return cache


def bytes_read(cache: _Cache, position: int, chunk_size: int) -> int:
    """Bytes that a step at `position` reads of a cache (arrays or their shapes) at least."""
    match cache:
        case ModelCache():
            return sum(bytes_read(layer, position, chunk_size) for layer in cache.layers)
        case AttentionCache() | LocalAttentionCache():
            return 2 * cache.key.dtype.itemsize * _first(cache.key, position)
        case RatState():
            summaries = 2 * cache.summary_key.dtype.itemsize * _first(cache.summary_key, position // chunk_size)
            return summaries + 2 * cache.key.dtype.itemsize * cache.key.size
        case RattentionCache():
            state = cache.state.dtype.itemsize * cache.state.size
            return bytes_read(cache.ring, position, chunk_size) + state
        case RnnCache():
            return cache.state.dtype.itemsize * cache.state.size


def _first(x: Array, slots: int) -> int:
    """Values in the first slots of x [B, S, N, H]."""
    return x.size // x.shape[1] * min(slots, x.shape[1])
