"""RAT: gated recurrence inside chunks, softmax attention across chunk summaries (arXiv 2507.04416)."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.errors import require
from rat_jax.layers import Ahead, chrono_gate_bias, project_interleaved, projection
from rat_jax.mixers.base import (
    Mixer,
    MixerConfig,
    ModelShape,
    ReleaseCell,
    bytes_of,
    require_even_heads,
)
from rat_jax.ops.rat import RatImplementation, rat_mix
from rat_jax.ops.rat_types import RatState
from rat_jax.parameters import MATRIX_IN, MATRIX_OUT, VECTOR, ParameterSpec
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float


@dataclasses.dataclass(frozen=True)
class RatConfig(MixerConfig):
    """Gated linear recurrence inside chunks, softmax attention across chunk summaries; defaults of arXiv 2507.04416."""

    chunk_size: int = 16  # L, tokens; 1 is gated attention over all tokens, the sequence length is a gated RNN
    num_groups: int = 2  # G, query and key projections; head n uses group n mod G
    rope: bool = True  # rotate by the chunk's position; False is NoPE
    rope_base: float = 10_000.0

    def __post_init__(self):
        super().__post_init__()
        require(self.chunk_size >= 1, f"chunk_size must be 1 or more, got {self.chunk_size}")
        require(self.num_groups >= 1, f"num_groups must be 1 or more, got {self.num_groups}")
        require(self.rope_base > 1, f"rope_base must be above 1, got {self.rope_base}")

    def check(self, shape: ModelShape) -> None:
        require(
            shape.num_heads % self.num_groups == 0,
            f"num_groups must divide num_heads, got num_groups {self.num_groups} and num_heads {shape.num_heads}",
        )
        require_even_heads(self.rope, shape)

    def check_cut(self, shape: ModelShape, tokens: int, context: int, tensor: int) -> None:
        require(
            shape.num_heads % (tensor * self.num_groups) == 0,
            f"num_heads {shape.num_heads} must be a multiple of num_groups {self.num_groups} times config.mesh.tensor "
            f"{tensor}",
        )
        require(
            context == 1 or tokens % self.chunk_size == 0,
            f"the {context} parts of config.mesh.context have {tokens} tokens of each sequence, no multiple of "
            f"chunk_size {self.chunk_size}",
        )

    def mean_keys(self, shape: ModelShape, seq_len: int) -> float:
        return (seq_len / min(self.chunk_size, seq_len) - 1) / 2 + 1


class Rat(Mixer):
    """y = W_o rat_mix(W_i x); one projection gives z, v, g, q, k in this order. See `rat_jax.ops.rat` for the op."""

    Config = RatConfig
    PARAMETERS: ClassVar[Mapping[str, ParameterSpec]] = {
        "in_proj.kernel": MATRIX_IN,
        "out_proj.kernel": MATRIX_OUT,
        "gate_bias": VECTOR,
    }
    IMPLEMENTATIONS = typing.get_args(RatImplementation)
    PROJECTS_ONCE = True
    RELEASE = ReleaseCell(
        "rat",
        fields={"ngroups": "num_groups", "chunk_size": "chunk_size"},
        has_heads=True,
        rotation="interrope",
        parameters={"gate_bias": ("gate_bias",)},
    )

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        chunk_size: int = RatConfig.chunk_size,
        num_groups: int = RatConfig.num_groups,
        rope: bool = RatConfig.rope,
        rope_base: float = RatConfig.rope_base,
        dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: RatImplementation | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes parameters from `rngs`; the arguments are those of `RatConfig` and `ModelShape`.

        Raises:
          ConfigError: naming the argument that does not fit.
        """
        self.shape = ModelShape(width=width, num_heads=num_heads, dtype=jnp.dtype(dtype).name)
        self.config = RatConfig(chunk_size, num_groups, rope, rope_base)
        self.config.check(self.shape)
        self.implementation = implementation
        grouped = num_groups * self.shape.head_dim
        self.in_proj = projection(width, 3 * width + 2 * grouped, jnp.dtype(dtype), rngs)
        self.out_proj = projection(width, width, jnp.dtype(dtype), rngs)
        self.gate_bias = nnx.Param(chrono_gate_bias(rngs.params(), width, chunk_size))

    def mix(
        self,
        x: Float[Array, "B T D"],
        segments: SegmentInfo,
        memory: RatState | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "B T D"], RatState | None]:
        width, grouped = self.shape.width, self.config.num_groups * self.shape.head_dim
        mixed = rat_mix(
            project_interleaved(self.in_proj, x, cut=(width,) * 3, whole=2 * grouped, ahead=ahead),
            self.gate_bias[...],
            segments,
            num_heads=self.shape.num_heads,
            num_groups=self.config.num_groups,
            chunk_size=self.config.chunk_size,
            rope_base=self.config.rope_base if self.config.rope else None,
            state=memory,
            implementation=self.implementation,
        )
        return mixed.out, mixed.state

    def init_memory(self, batch_size: int, capacity: int) -> RatState:
        shape, dtype = self.shape, jnp.dtype(self.shape.dtype)
        return RatState.empty(batch_size, capacity, shape.num_heads, shape.head_dim, self.config.chunk_size, dtype)

    def step_bytes(self, memory: RatState, position: int) -> int:
        summaries = 2 * bytes_of(memory.summary_key, position // self.config.chunk_size)
        return summaries + 2 * bytes_of(memory.key)
