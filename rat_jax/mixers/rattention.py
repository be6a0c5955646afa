"""RAttention: a sliding window, and residual linear attention over all that has left it (arXiv 2506.15545)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.config import ModelConfig
from rat_jax.layers import INITIAL_STD, PerHeadRmsNorm, RmsNorm, projection
from rat_jax.mixers.local_attention import LocalAttentionCache, attend_in_window
from rat_jax.ops.linear_attention import linear_attention
from rat_jax.ops.linear_attention_types import LinearAttentionOutput
from rat_jax.ops.linear_attention_xla import features, lagged
from rat_jax.ops.residual_linear_attention import residual_linear_attention
from rat_jax.ops.rope import rotate
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32

_BRANCH_NORM_EPSILON = 1e-8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RattentionCache:
    """The window's tokens, and the sum over those of the last document that have left it: nothing that grows."""

    ring: LocalAttentionCache
    state: Float32[Array, "B K 2*H H"]  # of the last document, without the learned initial state


class Rattention(nnx.Module):
    """y = W_o (RMS_a(local) + RMS_b(linear)), two branches that read each past token once between them.

    One projection gives q, k, v in this order; with `qk_norm` q and k are normalised. The local branch is attention to
    the token itself and the `window` tokens before it, with q and k rotated; the linear branch is
    `residual_linear_attention` of the same q, k and v before the rotation. Each branch is normalised head by head.

    Options: `meta_tokens` M > 0 lets the linear branch's state start from sum_m phi(k_m)^T v_m over M learned pairs;
    `learned_scales` multiplies its queries and keys by learned vectors.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype, options = jnp.dtype(config.dtype), config.rattention
        kv_width = config.kv_heads * config.head_dim
        self.in_proj = projection(config.width, config.width + 2 * kv_width, dtype, rngs)
        self.out_proj = projection(config.width, config.width, dtype, rngs)
        self.local_norm = PerHeadRmsNorm(config.width, _BRANCH_NORM_EPSILON)
        self.linear_norm = PerHeadRmsNorm(config.width, _BRANCH_NORM_EPSILON)
        if config.qk_norm:
            self.query_norm, self.key_norm = RmsNorm(config.head_dim), RmsNorm(config.head_dim)
        if options.learned_scales:
            self.query_scale = nnx.Param(jnp.ones((config.width,), jnp.float32))
            self.key_scale = nnx.Param(jnp.ones((kv_width,), jnp.float32))
        if options.meta_tokens:
            self.meta_key, self.meta_value = (
                nnx.Param(INITIAL_STD * jax.random.normal(rngs.params(), (options.meta_tokens, kv_width), jnp.float32))
                for _ in range(2)
            )

    def init_cache(self, batch_size: int, capacity: int) -> RattentionCache:
        """An empty cache; its size does not grow with `capacity` once that exceeds the window."""
        config = self.config
        return RattentionCache(
            ring=LocalAttentionCache.empty(batch_size, capacity, config.rattention.window, config),
            state=jnp.zeros((batch_size, config.kv_heads, 2 * config.head_dim, config.head_dim), jnp.float32),
        )

    def __call__(
        self, x: Float[Array, "B T D"], segments: SegmentInfo, cache: RattentionCache | None = None
    ) -> tuple[Float[Array, "B T D"], RattentionCache | None]:
        """Mixes tokens; see `rat_jax.mixers` for the contract."""
        mixed, cache = self.mix(self.in_proj(x), segments, cache)
        return self.out_proj(mixed), cache

    def mix(
        self, projected: Float[Array, "B T X"], segments: SegmentInfo, cache: RattentionCache | None = None
    ) -> tuple[Float[Array, "B T D"], RattentionCache | None]:
        """Everything between the two projections: q, k and v of all heads side by side, to the sum of both branches."""
        config, options = self.config, self.config.rattention
        query, key, value = self._split(projected)
        if config.qk_norm:
            query, key = self.query_norm(query), self.key_norm(key)
        with jax.named_scope("linear_branch"):
            if cache is None:
                state = None
                linear = residual_linear_attention(
                    self._scaled(query, "query_scale"),
                    self._scaled(key, "key_scale"),
                    value,
                    window=options.window,
                    feature_map=options.feature_map,
                    initial_state=self._initial_state(),
                    segment_ids=None if segments.contiguous else segments.segment_ids,
                ).out
            else:
                linear, state = self._extend(query, key, value, segments, cache)
        with jax.named_scope("local_branch"):
            if options.rope:
                query, key = (rotate(x, segments.positions, options.rope_base) for x in (query, key))
            ring = None if cache is None else cache.ring
            local, ring = attend_in_window(query, key, value, segments, ring, options.window)
        mixed = (self.local_norm(local) + self.linear_norm(linear)).astype(projected.dtype)
        return mixed.reshape(*mixed.shape[:2], -1), None if cache is None else RattentionCache(ring, state)

    def _split(self, projected: Array) -> tuple[Array, Array, Array]:
        config = self.config
        edges = [config.width, config.width + config.kv_heads * config.head_dim]
        parts = jnp.split(projected, edges, axis=-1)
        return tuple(x.reshape(*x.shape[:2], -1, config.head_dim) for x in parts)

    def _scaled(self, x: Float[Array, "*n h H"], name: str) -> Float[Array, "*n h H"]:
        if not self.config.rattention.learned_scales:
            return x
        scale = getattr(self, name)[...].reshape((1,) * (x.ndim - 2) + x.shape[-2:])
        return (x.astype(jnp.float32) * scale).astype(x.dtype)

    def _initial_state(self) -> Float32[Array, "1 K 2*H H"] | None:
        if not self.config.rattention.meta_tokens:
            return None
        key, value = (
            x[...].astype(self.config.dtype).reshape(-1, self.config.kv_heads, self.config.head_dim)
            for x in (self.meta_key, self.meta_value)
        )
        key = features(self._scaled(key, "key_scale"), self.config.rattention.feature_map)
        return jnp.einsum("mkf,mkh->kfh", key, value.astype(jnp.float32))[None]

    def _extend(
        self, query: Array, key: Array, value: Array, segments: SegmentInfo, cache: RattentionCache
    ) -> LinearAttentionOutput:
        """The linear branch of tokens that follow those in the cache.

        With each new token t the token t - W - 1 leaves the window, and enters the state if it is of the same document.
        It stands in the ring or, W + 1 places earlier, among the new tokens; the ring's keys are rotated back.
        """
        options, ring = self.config.rattention, cache.ring
        rows = jnp.arange(query.shape[0])[:, None]
        reach = options.window + 1
        order = segments.token_index - reach
        slots = order % ring.token_index.shape[1]
        from_ring = (ring.token_index[rows, slots] == order) & (ring.segment_ids[rows, slots] == segments.segment_ids)
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
            state=cache.state,
        )
