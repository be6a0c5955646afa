"""RAttention: a sliding window, and residual linear attention over all that has left it (arXiv 2506.15545)."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.errors import require
from rat_jax.layers import INITIAL_STD, Ahead, RmsNorm, project_parts, projection
from rat_jax.mixers.base import Mixer, MixerConfig, ModelShape, bytes_of, require_even_heads
from rat_jax.mixers.local_attention import LocalAttentionCache, attend_in_window, mean_keys_in_window
from rat_jax.ops.linear_attention import LinearImplementation, linear_attention
from rat_jax.ops.linear_attention_types import LinearAttentionOutput
from rat_jax.ops.linear_attention_xla import features, lagged
from rat_jax.ops.normed_sum import normed_sum
from rat_jax.ops.residual_linear_attention import residual_linear_attention
from rat_jax.ops.rope import rotate, rotate_tokens
from rat_jax.parameters import MATRIX_IN, MATRIX_OUT, VECTOR, ParameterSpec
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32

_BRANCH_NORM_EPSILON = 1e-8
_META = ParameterSpec((None, "kv_channels"), matmul=True)  # [meta_tokens, K H]


@dataclasses.dataclass(frozen=True)
class RattentionConfig(MixerConfig):
    """Softmax attention within a sliding window, linear attention over what has left it; defaults of the paper."""

    window: int = 512  # W, earlier tokens that the window's attention sees besides the token itself
    rope: bool = True  # of the window's attention; False is NoPE
    rope_base: float = 500_000.0
    feature_map: Literal["softmax", "relu"] = "softmax"  # of the linear branch: [m(x), m(-x)] over a head's channels
    meta_tokens: int = 0  # learned pairs of key and value that the linear state starts from (the paper's option: 128)
    learned_scales: bool = False  # multiply the linear branch's queries and keys by learned vectors before the features
    branch_scale: float = 1.0  # that both branches' norms start from; models of small weights learn slowly by 1

    def __post_init__(self):
        super().__post_init__()
        require(self.window >= 0, f"window must be 0 or more, got {self.window}")
        require(self.rope_base > 1, f"rope_base must be above 1, got {self.rope_base}")
        require(self.meta_tokens >= 0, f"meta_tokens must be 0 or more, got {self.meta_tokens}")
        require(0 < self.branch_scale < math.inf, f"branch_scale must be above 0, got {self.branch_scale}")

    def check(self, shape: ModelShape) -> None:
        require_even_heads(self.rope, shape)

    def mean_keys(self, shape: ModelShape, seq_len: int) -> float:
        # The state of 2 H by H is written once for each key head and read once for each query head.
        state = shape.head_dim * (1 + shape.kv_heads / shape.num_heads)
        return mean_keys_in_window(self.window, seq_len) + state


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RattentionCache:
    """The window's tokens, and the sum over those of the last document that have left it: nothing that grows."""

    ring: LocalAttentionCache
    state: Float32[Array, "B K E H"]  # of the last document, without the learned initial state


class BranchNorm(nnx.Module):
    """The scale of a norm over the channels of each head by itself, of all heads' channels.

    It is a vector because vectors stay float32 where matrices may be cast.
    """

    def __init__(self, width: int, initial_scale: float):
        self.scale = nnx.Param(jnp.full((width,), initial_scale, jnp.float32))


class Rattention(Mixer):
    """y = W_o (RMS_a(local) + RMS_b(linear)): together the two branches read each past token exactly once.

    One projection gives q, k, v in this order; with `qk_norm` q and k are normalised. The local branch is attention to
    the token itself and the `window` tokens before it, with q and k rotated; the linear branch is
    `residual_linear_attention` of the same q, k and v before the rotation. Each branch is normalised head by head.

    Options: `meta_tokens` M > 0 lets the linear branch's state start from sum_m phi(k_m)^T v_m over M learned pairs;
    `learned_scales` multiplies its queries and keys by learned vectors. `branch_scale` is what the norms' scales start
    from: a branch that has read anything adds so much RMS to each head, of which W_o passes on sqrt(D) / 50; below 1
    small models learn sooner (docs/evidence.md). `implementation` is that of the linear branch where there is no cache.
    """

    Config = RattentionConfig
    IMPLEMENTATIONS = typing.get_args(LinearImplementation)
    PROJECTS_ONCE = True
    PARAMETERS: ClassVar[Mapping[str, ParameterSpec]] = {
        "in_proj.kernel": MATRIX_IN,
        "out_proj.kernel": MATRIX_OUT,
        "query_norm.scale": VECTOR,
        "key_norm.scale": VECTOR,
        "local_norm.scale": VECTOR,
        "linear_norm.scale": VECTOR,
        "query_scale": VECTOR,
        "key_scale": VECTOR,
        "meta_key": _META,
        "meta_value": _META,
    }

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        window: int = RattentionConfig.window,
        num_kv_heads: int | None = None,
        qk_norm: bool = False,
        rope: bool = RattentionConfig.rope,
        rope_base: float = RattentionConfig.rope_base,
        feature_map: Literal["softmax", "relu"] = RattentionConfig.feature_map,
        meta_tokens: int = RattentionConfig.meta_tokens,
        learned_scales: bool = RattentionConfig.learned_scales,
        branch_scale: float = RattentionConfig.branch_scale,
        dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: LinearImplementation | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes parameters from `rngs`; the arguments are those of `RattentionConfig` and `ModelShape`.

        Raises:
          ConfigError: naming the argument that does not fit.
        """
        self.shape = shape = ModelShape(
            width=width, num_heads=num_heads, num_kv_heads=num_kv_heads, qk_norm=qk_norm, dtype=jnp.dtype(dtype).name
        )
        self.config = RattentionConfig(window, rope, rope_base, feature_map, meta_tokens, learned_scales, branch_scale)
        self.config.check(shape)
        self.implementation = implementation
        kv_width = shape.kv_heads * shape.head_dim
        self.in_proj = projection(width, width + 2 * kv_width, jnp.dtype(dtype), rngs)
        self.out_proj = projection(width, width, jnp.dtype(dtype), rngs)
        self.local_norm, self.linear_norm = (BranchNorm(width, branch_scale) for _ in range(2))
        if qk_norm:
            self.query_norm, self.key_norm = RmsNorm(shape.head_dim), RmsNorm(shape.head_dim)
        if learned_scales:
            self.query_scale = nnx.Param(jnp.ones((width,), jnp.float32))
            self.key_scale = nnx.Param(jnp.ones((kv_width,), jnp.float32))
        if meta_tokens:
            self.meta_key, self.meta_value = (
                nnx.Param(INITIAL_STD * jax.random.normal(rngs.params(), (meta_tokens, kv_width), jnp.float32))
                for _ in range(2)
            )

    def mix(
        self,
        x: Float[Array, "B T D"],
        segments: SegmentInfo,
        memory: RattentionCache | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "B T D"], RattentionCache | None]:
        shape = self.shape
        kv_width = shape.kv_heads * shape.head_dim
        parts = project_parts(self.in_proj, x, shape.width, kv_width, kv_width, ahead=ahead)
        query, key, value = (part.reshape(*part.shape[:2], -1, shape.head_dim) for part in parts)
        if shape.qk_norm:
            # XLA would keep them in float32 for the rotation, and round them in another pass for the linear branch.
            query, key = jax.lax.optimization_barrier((self.query_norm(query), self.key_norm(key)))
        with jax.named_scope("linear_branch"):
            linear, state = self._linear_branch(query, key, value, segments, memory)
        with jax.named_scope("local_branch"):
            if self.config.rope:
                query, key = (rotate_tokens(heads, segments, self.config.rope_base) for heads in (query, key))
            ring = None if memory is None else memory.ring
            local, ring = attend_in_window(query, key, value, segments, ring, self.config.window)
        scales = self.local_norm.scale[...], self.linear_norm.scale[...]
        mixed = normed_sum(local, linear, *scales, epsilon=_BRANCH_NORM_EPSILON).astype(x.dtype)
        return mixed.reshape(x.shape), None if memory is None else RattentionCache(ring, state)

    def init_memory(self, batch_size: int, capacity: int) -> RattentionCache:
        shape = self.shape
        return RattentionCache(
            ring=LocalAttentionCache.empty(batch_size, capacity, self.config.window, shape),
            state=jnp.zeros((batch_size, shape.kv_heads, 2 * shape.head_dim, shape.head_dim), jnp.float32),
        )

    def step_bytes(self, memory: RattentionCache, position: int) -> int:
        return memory.ring.bytes_read(position) + bytes_of(memory.state)

    def _linear_branch(
        self, query: Array, key: Array, value: Array, segments: SegmentInfo, memory: RattentionCache | None
    ) -> tuple[Float[Array, "B T N H"], Float32[Array, "B K E H"] | None]:
        """What has left the window, and the sum over it if there is a memory."""
        if memory is not None:
            return self._extend(query, key, value, segments, memory)
        linear = residual_linear_attention(
            self._scaled(query, "query_scale"),
            self._scaled(key, "key_scale"),
            value,
            window=self.config.window,
            feature_map=self.config.feature_map,
            initial_state=self._initial_state(),
            segment_ids=None if segments.contiguous else segments.segment_ids,
            implementation=self.implementation,
        )
        return linear.out, None

    def _scaled(
        self, x: Float[Array, "*axes n H"], name: Literal["query_scale", "key_scale"]
    ) -> Float[Array, "*axes n H"]:
        if not self.config.learned_scales:
            return x
        scale = self.query_scale if name == "query_scale" else self.key_scale
        scale = scale[...].reshape((1,) * (x.ndim - 2) + x.shape[-2:])
        return (x.astype(jnp.float32) * scale).astype(x.dtype)

    def _initial_state(self) -> Float32[Array, "1 K E H"] | None:
        if not self.config.meta_tokens:
            return None
        key, value = (
            x[...].astype(self.shape.dtype).reshape(-1, self.shape.kv_heads, self.shape.head_dim)
            for x in (self.meta_key, self.meta_value)
        )
        key = features(self._scaled(key, "key_scale"), self.config.feature_map)
        return jnp.einsum("mke,mkh->keh", key, value.astype(jnp.float32))[None]

    def _extend(
        self, query: Array, key: Array, value: Array, segments: SegmentInfo, memory: RattentionCache
    ) -> LinearAttentionOutput:
        """The linear branch of tokens that follow those in the memory.

        With each new token t the token t - W - 1 leaves the window, and enters the state if it is of the same document.
        It is in the ring or, W + 1 columns earlier, among the new tokens; the ring's keys are rotated back.
        """
        options, ring = self.config, memory.ring
        rows = jnp.arange(query.shape[0])[:, None]
        reach = options.window + 1
        index = segments.token_index - reach
        ring_size = ring.key.shape[1]
        slots = index % ring_size
        held_segments, held_index = segments.held_in_ring(ring_size)
        from_ring = (held_index[rows, slots] == index) & (held_segments[rows, slots] == segments.segment_ids)
        left_key, left_value = ring.key[rows, slots], ring.value[rows, slots]
        if options.rope:
            left_key = rotate(left_key, reach - segments.positions, options.rope_base)
        if query.shape[1] > reach:
            from_new = (lagged(segments.segment_ids, reach) == segments.segment_ids)[..., None, None]
            left_key = jnp.where(from_new, lagged(key, reach), left_key)
            left_value = jnp.where(from_new, lagged(value, reach), left_value)
            from_ring |= from_new[..., 0, 0]
        enters = (from_ring & segments.is_token)[..., None, None]
        return linear_attention(
            self._scaled(query, "query_scale"),
            self._scaled(left_key, "key_scale"),
            jnp.where(enters, left_value, 0),
            feature_map=options.feature_map,
            initial_state=self._initial_state(),
            segment_ids=segments,
            state=memory.state,
        )
