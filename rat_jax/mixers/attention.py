"""Causal softmax attention over all earlier tokens."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.errors import require
from rat_jax.layers import Ahead, RmsNorm, project_parts, projection
from rat_jax.mixers.base import (
    Mixer,
    MixerConfig,
    ModelShape,
    ReleaseCell,
    bytes_of,
    require_even_heads,
)
from rat_jax.ops.attention import KeyInfo, attention
from rat_jax.ops.rope import rotate_tokens
from rat_jax.parameters import MATRIX_IN, MATRIX_OUT, VECTOR, ParameterSpec
from rat_jax.segments import SegmentInfo, write_slots
from rat_jax.shapes import Array, Float


@dataclasses.dataclass(frozen=True)
class AttentionConfig(MixerConfig):
    """Causal softmax attention over all earlier tokens."""

    rope: bool = True  # rotate queries and keys by their position; False is NoPE
    rope_base: float = 10_000.0  # arXiv 2104.09864; the longest wavelength of the rotation is 2 pi rope_base tokens

    def __post_init__(self):
        super().__post_init__()
        require(self.rope_base > 1, f"rope_base must be above 1, got {self.rope_base}")

    def check(self, shape: ModelShape) -> None:
        require_even_heads(self.rope, shape)

    def mean_keys(self, shape: ModelShape, seq_len: int) -> float:
        return (seq_len + 1) / 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionCache:
    """Keys (rotated) and values of every token so far; slot s holds token s of the row, padding not counted."""

    key: Float[Array, "B S K H"]
    value: Float[Array, "B S K H"]


class HeadProjections(Mixer):
    """What `Attention` and `LocalAttention` share: one projection that gives v, q, k in this order, and the output's.

    With fewer key than query heads, neighbouring query heads share one; with `qk_norm` q and k are normalised before
    they are rotated.
    """

    PARAMETERS: ClassVar[Mapping[str, ParameterSpec]] = {
        "in_proj.kernel": MATRIX_IN,
        "out_proj.kernel": MATRIX_OUT,
        "query_norm.scale": VECTOR,
        "key_norm.scale": VECTOR,
    }

    PROJECTS_ONCE = True

    def __init__(self, shape: ModelShape, config: MixerConfig, rngs: nnx.Rngs):
        config.check(shape)
        self.shape, self.config = shape, config
        kv_width = shape.kv_heads * shape.head_dim
        self.in_proj = projection(shape.width, shape.width + 2 * kv_width, jnp.dtype(shape.dtype), rngs)
        self.out_proj = projection(shape.width, shape.width, jnp.dtype(shape.dtype), rngs)
        if shape.qk_norm:
            self.query_norm, self.key_norm = RmsNorm(shape.head_dim), RmsNorm(shape.head_dim)

    def _heads(
        self, x: Float[Array, "B T D"], segments: SegmentInfo, ahead: Ahead | None
    ) -> tuple[Float[Array, "B T N H"], Float[Array, "B T K H"], Float[Array, "B T K H"]]:
        """Queries, keys and values."""
        kv_width = self.shape.kv_heads * self.shape.head_dim
        parts = project_parts(self.in_proj, x, kv_width, self.shape.width, kv_width, ahead=ahead)
        value, query, key = (part.reshape(*part.shape[:2], -1, self.shape.head_dim) for part in parts)
        if self.shape.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.config.rope:
            query, key = (rotate_tokens(heads, segments, self.config.rope_base) for heads in (query, key))
        return query, key, value


class Attention(HeadProjections):
    """y = W_o softmax(q k^T / sqrt(H)) v with q, k rotated by position, over all earlier tokens of the document."""

    Config = AttentionConfig
    RELEASE = ReleaseCell("attention", fields={}, has_heads=True, rotation="rope")

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        rope: bool = AttentionConfig.rope,
        rope_base: float = AttentionConfig.rope_base,
        dtype: jax.typing.DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        """Makes parameters from `rngs`; the arguments are those of `AttentionConfig` and `ModelShape`.

        Raises:
          ConfigError: naming the argument that does not fit.
        """
        shape = ModelShape(
            width=width, num_heads=num_heads, num_kv_heads=num_kv_heads, qk_norm=qk_norm, dtype=jnp.dtype(dtype).name
        )
        super().__init__(shape, AttentionConfig(rope, rope_base), rngs)

    def mix(
        self,
        x: Float[Array, "B T D"],
        segments: SegmentInfo,
        memory: AttentionCache | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "B T D"], AttentionCache | None]:
        query, key, value = self._heads(x, segments, ahead)
        info = KeyInfo(segments.segment_ids, segments.token_index, segments.contiguous)
        key_info, aligned = info, memory is None
        if memory is not None:
            memory, key_info = _append(memory, key, value, segments)
            key, value = memory.key, memory.value
        mixed = attention(query, key, value, query_info=info, key_info=key_info, aligned=aligned)
        return mixed.out.reshape(*mixed.out.shape[:2], -1), memory

    def init_memory(self, batch_size: int, capacity: int) -> AttentionCache:
        shape = (batch_size, capacity, self.shape.kv_heads, self.shape.head_dim)
        zeros = jnp.zeros(shape, self.shape.dtype)
        return AttentionCache(zeros, zeros)

    def step_bytes(self, memory: AttentionCache, position: int) -> int:
        return 2 * bytes_of(memory.key, position)


def _append(memory: AttentionCache, key: Array, value: Array, segments: SegmentInfo) -> tuple[AttentionCache, KeyInfo]:
    """The cache with new tokens, and what its slots hold then."""
    num_slots = memory.key.shape[1]
    write = functools.partial(write_slots, jnp.where(segments.is_token, segments.token_index, num_slots))
    segment_ids = write(segments.held(num_slots), segments.segment_ids)
    token_index = jnp.broadcast_to(jnp.arange(num_slots, dtype=jnp.int32)[None], segment_ids.shape)
    return AttentionCache(write(memory.key, key), write(memory.value, value)), KeyInfo(segment_ids, token_index)
