"""Attention as fast as a GPU has it, without the library: cuDNN through JAX's own function, decode steps too.

The library's mixers run cuDNN for whole rows; their decode steps honour documents and padding, which cuDNN does not
take. What is compared with RAT must not be slower than it need be, so that the tables have these rows as well.
"""

import dataclasses

import jax
import jax.numpy as jnp

from rat_jax.layers import Ahead
from rat_jax.mixers import Attention, LocalAttention
from rat_jax.mixers.attention import AttentionCache
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float

_SLOTS = 64  # cuDNN takes keys in multiples of this at its fastest


class CudnnAttention(Attention):
    """Rows of one unpadded document, all at the same position."""

    def mix(
        self,
        x: Float[Array, "B T D"],
        segments: SegmentInfo,
        memory: AttentionCache | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionCache | None]:
        query, key, value = self._heads(x, segments, ahead)
        if memory is None:
            out = jax.nn.dot_product_attention(query, key, value, is_causal=True, implementation="cudnn")
        else:
            out, memory = _step(query, key, value, segments, memory, None)
        return out.reshape(*out.shape[:2], -1), memory

    def init_memory(self, batch_size: int, capacity: int) -> AttentionCache:
        return super().init_memory(batch_size, -(-capacity // _SLOTS) * _SLOTS)


class CudnnLocalAttention(LocalAttention):
    """The same within a window; the cache is a ring in which the order of keys does not matter."""

    def mix(
        self,
        x: Float[Array, "B T D"],
        segments: SegmentInfo,
        memory: AttentionCache | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionCache | None]:
        query, key, value = self._heads(x, segments, ahead)
        window = self.config.window
        if memory is None:
            out = jax.nn.dot_product_attention(
                query, key, value, is_causal=True, local_window_size=(window, 0), implementation="cudnn"
            )
        else:
            out, memory = _step(query, key, value, segments, memory, window + 1)
        return out.reshape(*out.shape[:2], -1), memory

    def init_memory(self, batch_size: int, capacity: int) -> AttentionCache:
        slots = -(-min(self.config.window + 1, capacity) // _SLOTS) * _SLOTS
        zeros = jnp.zeros((batch_size, slots, self.shape.kv_heads, self.shape.head_dim), self.shape.dtype)
        return AttentionCache(zeros, zeros)

    def step_bytes(self, memory: AttentionCache, position: int) -> int:
        share = min(position, memory.key.shape[1]) / memory.key.shape[1]
        return round(2 * memory.key.size * memory.key.dtype.itemsize * share)


BASELINES = {"cudnn_attention": CudnnAttention, "cudnn_local_attention": CudnnLocalAttention}


def _step(
    query: Array, key: Array, value: Array, segments: SegmentInfo, memory: AttentionCache, ring: int | None
) -> tuple[Array, AttentionCache]:
    position = segments.positions[0, 0]
    slot = position if ring is None else position % ring
    count = position + 1 if ring is None else jnp.minimum(position + 1, ring)
    memory = dataclasses.replace(
        memory,
        key=jax.lax.dynamic_update_slice_in_dim(memory.key, key, slot, axis=1),
        value=jax.lax.dynamic_update_slice_in_dim(memory.value, value, slot, axis=1),
    )
    lengths = jnp.full((query.shape[0],), count, jnp.int32)
    out = jax.nn.dot_product_attention(
        query, memory.key, memory.value, key_value_seq_lengths=lengths, implementation="cudnn"
    )
    return out, memory
