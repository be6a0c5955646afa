"""Causal softmax attention over all earlier tokens."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.config import ModelConfig
from rat_jax.layers import RmsNorm, projection
from rat_jax.ops.attention import KeyInfo, attention
from rat_jax.ops.rope import rotate
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """Keys (rotated) and values of every token so far; slot s holds token s of the row, padding not counted."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]
    segment_ids: Int[Array, "B S"]  # 0 where nothing has been written


class Attention(nnx.Module):
    """y = W_o softmax(q k^T / sqrt(H)) v with q, k rotated by position; one projection gives v, q, k in this order.

    With fewer key than query heads, neighbouring query heads share one (arXiv 2305.13245); with `qk_norm` q and k are
    normalised before they are rotated (arXiv 2302.05442, with RMS norms).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.in_proj = projection(config.width, config.width + 2 * config.kv_heads * config.head_dim, dtype, rngs)
        self.out_proj = projection(config.width, config.width, dtype, rngs)
        if config.qk_norm:
            self.query_norm, self.key_norm = RmsNorm(config.head_dim), RmsNorm(config.head_dim)

    def init_cache(self, batch_size: int, capacity: int) -> AttentionCache:
        """An empty cache with room for `capacity` tokens a row; tokens past that are not remembered."""
        shape = (batch_size, capacity, self.config.kv_heads, self.config.head_dim)
        zeros = jnp.zeros(shape, self.config.dtype)
        return AttentionCache(zeros, zeros, jnp.zeros(shape[:2], jnp.int32))

    def __call__(
        self, x: Float[Array, "B T D"], segments: SegmentInfo, cache: AttentionCache | None = None
    ) -> tuple[Float[Array, "B T D"], AttentionCache | None]:
        """Mixes tokens; see `rat_jax.mixers` for the contract."""
        query, key, value = split_heads(self.in_proj(x), self.config)
        if self.config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.config.attention.rope:
            base = self.config.attention.rope_base
            query, key = rotate(query, segments.positions, base), rotate(key, segments.positions, base)
        place = KeyInfo(segments.segment_ids, segments.token_index, segments.contiguous)
        key_info = place
        if cache is not None:
            cache = _append(cache, key, value, segments)
            key, value = cache.key, cache.value
            slots = jnp.arange(key.shape[1], dtype=jnp.int32)[None]
            key_info = KeyInfo(cache.segment_ids, jnp.broadcast_to(slots, cache.segment_ids.shape))
        mixed = attention(query, key, value, query_info=place, key_info=key_info)
        return self.out_proj(mixed.out.reshape(x.shape)), cache


def split_heads(
    projected: Float[Array, "B T D+2*K*H"], config: ModelConfig
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
    """Queries, keys and values of a projection that holds v, q, k."""
    kv_width = config.kv_heads * config.head_dim
    parts = jnp.split(projected, [kv_width, kv_width + config.width], axis=-1)
    value, query, key = (x.reshape(*x.shape[:2], -1, config.head_dim) for x in parts)
    return query, key, value


def _append(cache: AttentionCache, key: Array, value: Array, segments: SegmentInfo) -> AttentionCache:
    slots = jnp.where(segments.is_token, segments.token_index, cache.key.shape[1])
    rows = jnp.arange(slots.shape[0])[:, None]
    return AttentionCache(
        key=cache.key.at[rows, slots].set(key, mode="drop"),
        value=cache.value.at[rows, slots].set(value, mode="drop"),
        segment_ids=cache.segment_ids.at[rows, slots].set(segments.segment_ids, mode="drop"),
    )
