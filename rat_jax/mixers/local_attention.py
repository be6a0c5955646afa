"""Causal softmax attention within a sliding window."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.config import ModelConfig
from rat_jax.layers import projection
from rat_jax.layout import TokenLayout
from rat_jax.mixers.attention import split_heads
from rat_jax.ops.attention import Place, attention
from rat_jax.ops.rope import rotate
from rat_jax.shapes import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalAttentionCache:
    """A ring of the last W + 1 tokens: token s of the row (padding not counted) stands in slot s mod (W + 1)."""

    key: Float[Array, "B W+1 N H"]  # rotated
    value: Float[Array, "B W+1 N H"]
    segment_ids: Int[Array, "B W+1"]  # 0 where nothing has been written
    order: Int[Array, "B W+1"]  # which token of the row a slot holds


class LocalAttention(nnx.Module):
    """Attention in which a token sees itself and the `window` tokens before it; projections as in `Attention`."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.in_proj = projection(config.width, 3 * config.width, dtype, rngs)
        self.out_proj = projection(config.width, config.width, dtype, rngs)

    def init_cache(self, batch_size: int, capacity: int) -> LocalAttentionCache:
        """An empty cache; its size does not grow with `capacity` once that exceeds the window."""
        slots = min(self.config.local_attention.window + 1, capacity)
        shape = (batch_size, slots, self.config.num_heads, self.config.head_dim)
        zeros, empty = jnp.zeros(shape, self.config.dtype), jnp.zeros(shape[:2], jnp.int32)
        return LocalAttentionCache(zeros, zeros, segment_ids=empty, order=empty)

    def __call__(
        self, x: Float[Array, "B T D"], layout: TokenLayout, cache: LocalAttentionCache | None = None
    ) -> tuple[Float[Array, "B T D"], LocalAttentionCache | None]:
        """Mixes tokens; see `rat_jax.mixers` for the contract."""
        query, key, value = split_heads(self.in_proj(x), self.config.num_heads)
        if self.config.local_attention.rope:
            base = self.config.local_attention.rope_base
            query, key = rotate(query, layout.positions, base), rotate(key, layout.positions, base)
        new = LocalAttentionCache(key, value, layout.segment_ids, layout.order)
        if cache is None:
            seen = new
        elif x.shape[1] == 1:  # the slot that the new token takes holds one that has just left the window
            seen = cache = _write(cache, new)
        else:
            seen = jax.tree.map(lambda *parts: jnp.concatenate(parts, axis=1), cache, new)
            cache = _write(cache, new)
        mixed = attention(
            query,
            seen.key,
            seen.value,
            query_place=Place(layout.segment_ids, layout.order, layout.contiguous),
            key_place=Place(seen.segment_ids, seen.order, layout.contiguous and cache is None),
            window=self.config.local_attention.window,
            aligned=cache is None,
        )
        return self.out_proj(mixed.out.reshape(x.shape)), cache


def _write(cache: LocalAttentionCache, new: LocalAttentionCache) -> LocalAttentionCache:
    """The ring after new tokens; of those that would share a slot only the last is written."""
    size = cache.order.shape[1]
    is_token = new.segment_ids != 0
    last = jnp.max(jnp.where(is_token, new.order, -1), axis=1, keepdims=True)
    slots = jnp.where(is_token & (new.order > last - size), new.order % size, size)
    rows = jnp.arange(slots.shape[0])[:, None]
    return jax.tree.map(lambda old, added: old.at[rows, slots].set(added, mode="drop"), cache, new)
