"""Causal softmax attention within a sliding window."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.config import ModelConfig
from rat_jax.layers import RmsNorm, projection
from rat_jax.mixers.attention import split_heads
from rat_jax.ops.attention import KeyInfo, attention
from rat_jax.ops.rope import rotate
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalAttentionCache:
    """A ring of the last W + 1 tokens: token s of the row (padding not counted) stands in slot s mod (W + 1)."""

    key: Float[Array, "B W+1 K H"]  # rotated
    value: Float[Array, "B W+1 K H"]
    segment_ids: Int[Array, "B W+1"]  # 0 where nothing has been written
    token_index: Int[Array, "B W+1"]  # which token of the row a slot holds

    @classmethod
    def empty(cls, batch_size: int, capacity: int, window: int, config: ModelConfig) -> "LocalAttentionCache":
        """The ring before the first token; its size does not grow with `capacity` once that exceeds the window."""
        shape = (batch_size, min(window + 1, capacity), config.kv_heads, config.head_dim)
        zeros, none = jnp.zeros(shape, config.dtype), jnp.zeros(shape[:2], jnp.int32)
        return cls(zeros, zeros, segment_ids=none, token_index=none)

    def extend(self, new: "LocalAttentionCache") -> tuple["LocalAttentionCache", "LocalAttentionCache"]:
        """What new tokens may attend to, and the ring after them; `new` has a slot for each of them, in their order."""
        written = _write(self, new)
        if new.token_index.shape[1] == 1:  # the slot that the new token takes holds one that has just left the window
            return written, written
        return jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), self, new), written


class LocalAttention(nnx.Module):
    """Attention in which a token sees itself and the `window` tokens before it; projections as in `Attention`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.in_proj = projection(config.width, config.width + 2 * config.kv_heads * config.head_dim, dtype, rngs)
        self.out_proj = projection(config.width, config.width, dtype, rngs)
        if config.qk_norm:
            self.query_norm, self.key_norm = RmsNorm(config.head_dim), RmsNorm(config.head_dim)

    def init_cache(self, batch_size: int, capacity: int) -> LocalAttentionCache:
        """An empty cache; its size does not grow with `capacity` once that exceeds the window."""
        return LocalAttentionCache.empty(batch_size, capacity, self.config.local_attention.window, self.config)

    def __call__(
        self, x: Float[Array, "B T D"], segments: SegmentInfo, cache: LocalAttentionCache | None = None
    ) -> tuple[Float[Array, "B T D"], LocalAttentionCache | None]:
        """Mixes tokens; see `rat_jax.mixers` for the contract."""
        query, key, value = split_heads(self.in_proj(x), self.config)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.config.local_attention.rope:
            base = self.config.local_attention.rope_base
            query, key = rotate(query, segments.positions, base), rotate(key, segments.positions, base)
        mixed, cache = attend_in_window(query, key, value, segments, cache, self.config.local_attention.window)
        return self.out_proj(mixed.reshape(x.shape)), cache


def attend_in_window(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: SegmentInfo,
    cache: LocalAttentionCache | None,
    window: int,
) -> tuple[Float[Array, "B T N H"], LocalAttentionCache | None]:
    """Attention of new tokens to themselves and to `window` earlier ones, and the ring after them if there was one."""
    seen = LocalAttentionCache(key, value, segments.segment_ids, segments.token_index)
    aligned = cache is None
    if cache is not None:
        seen, cache = cache.extend(seen)
    attended = attention(
        query,
        seen.key,
        seen.value,
        query_info=KeyInfo(segments.segment_ids, segments.token_index, segments.contiguous),
        key_info=KeyInfo(seen.segment_ids, seen.token_index, segments.contiguous and aligned),
        window=window,
        aligned=aligned,
    )
    return attended.out, cache


def _write(cache: LocalAttentionCache, new: LocalAttentionCache) -> LocalAttentionCache:
    """The ring after new tokens; of those that would share a slot only the last is written."""
    size = cache.token_index.shape[1]
    is_token = new.segment_ids != 0
    last = jnp.max(jnp.where(is_token, new.token_index, -1), axis=1, keepdims=True)
    slots = jnp.where(is_token & (new.token_index > last - size), new.token_index % size, size)
    rows = jnp.arange(slots.shape[0])[:, None]
    return jax.tree.map(lambda old, added: old.at[rows, slots].set(added, mode="drop"), cache, new)
