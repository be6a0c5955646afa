"""Gated linear recurrence over the whole sequence: the RNN that RAT is compared with."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.errors import require
from rat_jax.layers import Ahead, chrono_gate_bias, project_interleaved, projection
from rat_jax.mixers.base import Mixer, MixerConfig, ModelShape, ReleaseCell, bytes_of, require_divides
from rat_jax.ops.rnn import RnnImplementation, rnn_mix
from rat_jax.parameters import MATRIX_IN, MATRIX_OUT, VECTOR, ParameterSpec
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32


@dataclasses.dataclass(frozen=True)
class RnnConfig(MixerConfig):
    """Gated linear recurrence over the whole sequence."""

    # Tokens; forget gates start with memory lengths spread over 1 .. max_timescale. arXiv 2507.04416 takes the length
    # of its sequences.
    max_timescale: int = 4096

    def __post_init__(self):
        super().__post_init__()
        require(self.max_timescale >= 3, f"max_timescale must be 3 tokens or more, got {self.max_timescale}")

    def check_cut(self, shape: ModelShape, tokens: int, context: int, tensor: int) -> None:
        require_divides("width", shape.width, tensor)

    def mean_keys(self, shape: ModelShape, seq_len: int) -> float:
        return 0.0


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RnnCache:
    """The state after the last token of each row."""

    state: Float32[Array, "B D"]


class Rnn(Mixer):
    """y = W_o (sigmoid(z) * v~) with v~_t = f_t v~_{t-1} + (1 - f_t) v_t, f = sigmoid(g + gate_bias).

    One projection gives z, v, g in this order (arXiv 2507.04416, the RNN baseline).
    """

    Config = RnnConfig
    PARAMETERS: ClassVar[Mapping[str, ParameterSpec]] = {
        "in_proj.kernel": MATRIX_IN,
        "out_proj.kernel": MATRIX_OUT,
        "gate_bias": VECTOR,
    }
    IMPLEMENTATIONS = typing.get_args(RnnImplementation)
    PROJECTS_ONCE = True
    RELEASE = ReleaseCell(
        "rnn",
        fields={"seq_len": "max_timescale"},
        has_heads=False,
        rotation=None,
        parameters={"gate_bias": ("gate_bias",)},
    )

    def __init__(
        self,
        width: int,
        num_heads: int = 1,
        *,
        max_timescale: int = RnnConfig.max_timescale,
        dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: RnnImplementation | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes parameters from `rngs`; the arguments are those of `RnnConfig` and `ModelShape`.

        Heads make no difference to a recurrence that takes each channel by itself.

        Raises:
          ConfigError: naming the argument that does not fit.
        """
        self.shape = ModelShape(width=width, num_heads=num_heads, dtype=jnp.dtype(dtype).name)
        self.config = RnnConfig(max_timescale)
        self.implementation = implementation
        self.in_proj = projection(width, 3 * width, jnp.dtype(dtype), rngs)
        self.out_proj = projection(width, width, jnp.dtype(dtype), rngs)
        self.gate_bias = nnx.Param(chrono_gate_bias(rngs.params(), width, max_timescale))

    def mix(
        self,
        x: Float[Array, "B T D"],
        segments: SegmentInfo,
        memory: RnnCache | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "B T D"], RnnCache | None]:
        width = self.shape.width
        mixed = rnn_mix(
            project_interleaved(self.in_proj, x, cut=(width,) * 3, whole=0, ahead=ahead),
            self.gate_bias[...],
            segments,
            state=None if memory is None else memory.state,
            implementation=self.implementation,
        )
        return mixed.out, None if memory is None else RnnCache(mixed.state)

    def init_memory(self, batch_size: int, capacity: int) -> RnnCache:
        del capacity  # the state has one size
        return RnnCache(jnp.zeros((batch_size, self.shape.width), jnp.float32))

    def step_bytes(self, memory: RnnCache, position: int) -> int:
        return bytes_of(memory.state)
