"""Causal softmax attention within a sliding window."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.errors import require
from rat_jax.layers import Ahead
from rat_jax.mixers.attention import HeadProjections
from rat_jax.mixers.base import MixerConfig, ModelShape, ReleaseCell, bytes_of, require_even_heads
from rat_jax.ops.attention import KeyInfo, attention
from rat_jax.segments import SegmentInfo, write_slots
from rat_jax.shapes import Array, Float


@dataclasses.dataclass(frozen=True)
class LocalAttentionConfig(MixerConfig):
    """Causal softmax attention within a sliding window."""

    window: int = 1024  # W, earlier tokens that a token sees besides itself; arXiv 2507.04416, the hybrids' 1024
    rope: bool = True  # rotate queries and keys by their position; False is NoPE
    rope_base: float = 10_000.0  # arXiv 2104.09864

    def __post_init__(self):
        super().__post_init__()
        require(self.window >= 0, f"window must be 0 or more, got {self.window}")
        require(self.rope_base > 1, f"rope_base must be above 1, got {self.rope_base}")

    def check(self, shape: ModelShape) -> None:
        require_even_heads(self.rope, shape)

    def mean_keys(self, shape: ModelShape, seq_len: int) -> float:
        return mean_keys_in_window(self.window, seq_len)


def mean_keys_in_window(window: int, seq_len: int) -> float:
    """Keys that a token sees on average, itself and at most `window` before it."""
    largest = min(window + 1, seq_len)
    return largest - largest * (largest - 1) / (2 * seq_len)  # the first `largest` tokens see 1, 2, ..., largest


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LocalAttentionCache:
    """A ring of the last W + 1 tokens: token s of the row (padding not counted) is in slot s mod (W + 1)."""

    key: Float[Array, "B S K H"]  # rotated; S = W + 1, or the capacity where it is less
    value: Float[Array, "B S K H"]

    @classmethod
    def empty(cls, batch_size: int, capacity: int, window: int, shape: ModelShape) -> "LocalAttentionCache":
        """The ring before the first token; its size does not grow with `capacity` once that exceeds the window."""
        ring = (batch_size, min(window + 1, capacity), shape.kv_heads, shape.head_dim)
        zeros = jnp.zeros(ring, shape.dtype)
        return cls(zeros, zeros)

    def extend(
        self, new: "LocalAttentionCache", segments: SegmentInfo
    ) -> tuple["LocalAttentionCache", KeyInfo, "LocalAttentionCache"]:
        """What new tokens may attend to, and the ring after them; `new` has a slot for each of them, in their order."""
        size = self.key.shape[1]
        last = jnp.max(jnp.where(segments.is_token, segments.token_index, -1), axis=1, keepdims=True)
        is_kept = segments.is_token & (segments.token_index > last - size)  # of those that share a slot the last
        slots = jnp.where(is_kept, segments.token_index % size, size)
        write = functools.partial(write_slots, slots)
        written = jax.tree.map(write, self, new)
        old_info, new_info = segments.held_in_ring(size), (segments.segment_ids, segments.token_index)
        if slots.shape[1] == 1:  # the slot that the new token takes holds one that has just left the window
            return written, KeyInfo(*map(write, old_info, new_info)), written

        def join(old: Array, added: Array) -> Array:
            return jnp.concatenate([old, added], axis=1)

        return jax.tree.map(join, self, new), KeyInfo(*map(join, old_info, new_info)), written

    def bytes_read(self, position: int) -> int:
        """Bytes that a step at `position` reads of keys and values."""
        return 2 * bytes_of(self.key, position)


class LocalAttention(HeadProjections):
    """y = W_o softmax(q k^T / sqrt(H)) v as in `Attention`, over a token itself and the `window` tokens before it."""

    Config = LocalAttentionConfig
    RELEASE = ReleaseCell("local_attention", fields={"window_size": "window"}, has_heads=True, rotation="rope")

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        window: int = LocalAttentionConfig.window,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        rope: bool = LocalAttentionConfig.rope,
        rope_base: float = LocalAttentionConfig.rope_base,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes parameters from `rngs`; the arguments are those of `LocalAttentionConfig` and `ModelShape`.

        Raises:
          ConfigError: naming the argument that does not fit.
        """
        shape = ModelShape(
            width=width, num_heads=num_heads, num_kv_heads=num_kv_heads, qk_norm=qk_norm, dtype=jnp.dtype(dtype).name
        )
        super().__init__(shape, LocalAttentionConfig(window, rope, rope_base), rngs)

    def mix(
        self,
        x: Float[Array, "B T D"],
        segments: SegmentInfo,
        memory: LocalAttentionCache | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "B T D"], LocalAttentionCache | None]:
        query, key, value = self._heads(x, segments, ahead)
        mixed, memory = attend_in_window(query, key, value, segments, memory, self.config.window)
        return mixed.reshape(*mixed.shape[:2], -1), memory

    def init_memory(self, batch_size: int, capacity: int) -> LocalAttentionCache:
        return LocalAttentionCache.empty(batch_size, capacity, self.config.window, self.shape)

    def step_bytes(self, memory: LocalAttentionCache, position: int) -> int:
        return memory.bytes_read(position)


def attend_in_window(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B T K H"],
    value: Float[Array, "B T K H"],
    segments: SegmentInfo,
    memory: LocalAttentionCache | None,
    window: int,
) -> tuple[Float[Array, "B T N H"], LocalAttentionCache | None]:
    """Attention of new tokens to themselves and to `window` earlier ones, and the ring after them if there was one."""
    seen = LocalAttentionCache(key, value)
    query_info = key_info = KeyInfo.of(segments)
    aligned = memory is None
    if memory is not None:
        seen, key_info, memory = memory.extend(seen, segments)
    attended = attention(
        query, seen.key, seen.value, query_info=query_info, key_info=key_info, window=window, aligned=aligned
    )
    return attended.out, memory
