"""Gated linear recurrence over the whole sequence: the RNN that RAT is compared with."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.config import ModelConfig
from rat_jax.layers import chrono_gate_bias, projection
from rat_jax.ops.recurrence import gated_recurrence
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RnnCache:
    """The state after the last token of each row."""

    state: Float32[Array, "B D"]


class Rnn(nnx.Module):
    """y = W_o (sigmoid(z) * v~) with v~_t = f_t v~_{t-1} + (1 - f_t) v_t, f = sigmoid(g + gate_bias).

    One projection gives z, v, g in this order (arXiv 2507.04416, the RNN baseline).
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        dtype = jnp.dtype(config.dtype)
        self.in_proj = projection(config.width, 3 * config.width, dtype, rngs)
        self.out_proj = projection(config.width, config.width, dtype, rngs)
        self.gate_bias = nnx.Param(chrono_gate_bias(rngs.params(), config.width, config.rnn.max_timescale))

    def init_cache(self, batch_size: int, capacity: int) -> RnnCache:
        """An empty cache; its size does not depend on `capacity`."""
        del capacity
        return RnnCache(jnp.zeros((batch_size, self.config.width), jnp.float32))

    def __call__(
        self, x: Float[Array, "B T D"], segments: SegmentInfo, cache: RnnCache | None = None
    ) -> tuple[Float[Array, "B T D"], RnnCache | None]:
        """Mixes tokens; see `rat_jax.mixers` for the contract."""
        z, value, gate = jnp.split(self.in_proj(x), 3, axis=-1)
        states = gated_recurrence(
            gate.astype(jnp.float32) + self.gate_bias[...].reshape(1, 1, -1),
            value,
            segment_ids=segments,
            initial_state=None if cache is None else cache.state,
        )
        mixed = (jax.nn.sigmoid(z.astype(jnp.float32)) * states).astype(x.dtype)
        return self.out_proj(mixed), None if cache is None else RnnCache(states[:, -1])
