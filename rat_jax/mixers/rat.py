"""RAT: gated recurrence inside chunks, softmax attention across chunk summaries (arXiv 2507.04416)."""

import jax.numpy as jnp
from flax import nnx

from rat_jax.config import ModelConfig
from rat_jax.layers import chrono_gate_bias, projection
from rat_jax.ops.rat import rat_mix
from rat_jax.ops.rat_types import RatState
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float


class Rat(nnx.Module):
    """y = W_o rat_mix(W_i x); one projection gives z, v, g, q, k in this order. See `rat_jax.ops.rat` for the op."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        grouped = config.rat.num_groups * config.head_dim
        self.in_proj = projection(config.width, 3 * config.width + 2 * grouped, dtype, rngs)
        self.out_proj = projection(config.width, config.width, dtype, rngs)
        self.gate_bias = nnx.Param(chrono_gate_bias(rngs.params(), config.width, config.rat.chunk_size))

    def init_cache(self, batch_size: int, capacity: int) -> RatState:
        """An empty cache with room for `capacity` tokens a row: one pair of vectors for every full chunk."""
        return RatState.empty(
            batch_size,
            capacity,
            self.config.num_heads,
            self.config.head_dim,
            self.config.rat.chunk_size,
            jnp.dtype(self.config.dtype),
        )

    def __call__(
        self, x: Float[Array, "B T D"], segments: SegmentInfo, cache: RatState | None = None
    ) -> tuple[Float[Array, "B T D"], RatState | None]:
        """Mixes tokens; see `rat_jax.mixers` for the contract."""
        mixed = rat_mix(
            self.in_proj(x),
            self.gate_bias[...],
            segments,
            num_heads=self.config.num_heads,
            num_groups=self.config.rat.num_groups,
            chunk_size=self.config.rat.chunk_size,
            rope_base=self.config.rat.rope_base if self.config.rat.rope else None,
            state=cache,
        )
        return self.out_proj(mixed.out), mixed.state
