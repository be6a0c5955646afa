"""Gated DeltaNet: a matrix-valued state that a gate fades and the delta rule rewrites (arXiv 2412.06464)."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.errors import require
from rat_jax.layers import Ahead, RmsNorm, project_groups, project_parts, projection
from rat_jax.mixers.base import Mixer, MixerConfig, ModelShape, bytes_of, require_divides
from rat_jax.ops.convolved_heads import convolved_heads
from rat_jax.ops.gated_delta_rule import GatedDeltaRuleImplementation, gated_delta_rule
from rat_jax.parameters import MATRIX_IN, MATRIX_OUT, VECTOR, ParameterSpec
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32

_DECAY_RATES = (1e-4, 16.0)  # exp(A_log) starts uniform between them; published from 0, whose logarithm is not finite
_TIME_STEPS = (1e-3, 0.1)  # softplus(dt_bias) starts log-uniform between them, as published


@dataclasses.dataclass(frozen=True)
class GatedDeltaNetConfig(MixerConfig):
    """The gated delta rule; defaults of arXiv 2412.06464 and its code (flash-linear-attention)."""

    num_heads: int | None = None  # N; None: the model's
    head_dim: int | None = None  # Hk, channels of a head's queries and keys; None: 3/4 width / N, as published
    expand_v: float = 2.0  # Hv / Hk: channels of a head's values for each of its keys
    conv_size: int = 4  # tokens that the convolutions of queries, keys and values see; 0: no convolution

    def __post_init__(self):
        super().__post_init__()
        require(self.num_heads is None or self.num_heads >= 1, f"num_heads must be 1 or more, got {self.num_heads}")
        require(self.head_dim is None or self.head_dim >= 1, f"head_dim must be 1 or more, got {self.head_dim}")
        require(self.expand_v > 0, f"expand_v must be above 0, got {self.expand_v}")
        require(self.conv_size >= 0, f"conv_size must be 0 or more, got {self.conv_size}")

    def check(self, shape: ModelShape) -> None:
        heads = self.heads(shape)
        require(
            self.head_dim is not None or 3 * shape.width % (4 * heads) == 0,
            f"head_dim must be given where num_heads does not divide 3/4 of the width, got num_heads {heads} and width "
            f"{shape.width}",
        )
        value_dim = self.key_dim(shape) * self.expand_v
        require(
            value_dim == self.value_dim(shape) >= 1,
            f"expand_v times head_dim must be a whole number, got {self.expand_v} and {self.key_dim(shape)}",
        )

    def check_cut(self, shape: ModelShape, tokens: int, context: int, tensor: int) -> None:
        require_divides("num_heads", self.heads(shape), tensor)

    def mean_keys(self, shape: ModelShape, seq_len: int) -> float:
        # The state of Hk by Hv is read for the key, written, and read for the query; an attended key is read twice.
        return 1.5 * self.heads(shape) * self.key_dim(shape) * self.value_dim(shape) / shape.width

    def heads(self, shape: ModelShape) -> int:
        """N."""
        return shape.num_heads if self.num_heads is None else self.num_heads

    def key_dim(self, shape: ModelShape) -> int:
        """Hk."""
        return 3 * shape.width // (4 * self.heads(shape)) if self.head_dim is None else self.head_dim

    def value_dim(self, shape: ModelShape) -> int:
        """Hv."""
        return round(self.key_dim(shape) * self.expand_v)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class GatedDeltaNetCache:
    """The state after the last token of each row, and what its next tokens' convolutions see: nothing that grows."""

    state: Float32[Array, "B N Hk Hv"]
    last_inputs: Float[Array, "B earlier c"]  # of conv_size - 1 tokens; c = N (2 Hk + Hv) of queries, keys and values


class GatedDeltaNet(Mixer):
    """y = W_o (RMS(o) * silu(g)) with o the gated delta rule of q, k and v; see `rat_jax.ops.gated_delta_rule`.

    One projection gives q, k, v, g in this order, another the write strengths' and decays' logits w and d, one a head:
    q, k, v = silu(convolution(q, k, v)); q and k then have length 1 in each head, q divided by sqrt(Hk);
    write_strength = sigmoid(w), log_decay = -exp(A_log) softplus(d + dt_bias). The norm is over the Hv channels of
    each head, with one scale for all heads.

    A named `implementation` is that of the rule; "xla" makes all of the layer plain XLA.
    """

    Config = GatedDeltaNetConfig
    PARAMETERS: ClassVar[Mapping[str, ParameterSpec]] = {
        "in_proj.kernel": MATRIX_IN,
        "gate_proj.kernel": MATRIX_IN,
        "out_proj.kernel": MATRIX_OUT,
        "convolution": ParameterSpec((None, None)),
        "A_log": VECTOR,
        "dt_bias": VECTOR,
        "norm.scale": VECTOR,
    }
    IMPLEMENTATIONS = typing.get_args(GatedDeltaRuleImplementation)

    def __init__(
        self,
        width: int,
        num_heads: int | None = GatedDeltaNetConfig.num_heads,
        *,
        head_dim: int | None = GatedDeltaNetConfig.head_dim,
        expand_v: float = GatedDeltaNetConfig.expand_v,
        conv_size: int = GatedDeltaNetConfig.conv_size,
        dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: GatedDeltaRuleImplementation | None = None,
        rngs: nnx.Rngs,
    ):
        """Makes parameters from `rngs`; the arguments are those of `GatedDeltaNetConfig`, but no heads are one head.

        The width need not be a multiple of the number of heads.

        Raises:
          ConfigError: naming the argument that does not fit.
        """
        self.shape = shape = ModelShape(width=width, num_heads=1, dtype=jnp.dtype(dtype).name)
        self.config = config = GatedDeltaNetConfig(num_heads, head_dim, expand_v, conv_size)
        config.check(shape)
        self.implementation = implementation
        num_heads = config.heads(shape)
        key_width, value_width = num_heads * config.key_dim(shape), num_heads * config.value_dim(shape)
        self.in_proj = projection(width, 2 * key_width + 2 * value_width, jnp.dtype(dtype), rngs)
        self.gate_proj = projection(width, 2 * num_heads, jnp.dtype(dtype), rngs)
        self.out_proj = projection(value_width, width, jnp.dtype(dtype), rngs)
        self.A_log = nnx.Param(jnp.log(jax.random.uniform(rngs.params(), (num_heads,), jnp.float32, *_DECAY_RATES)))
        self.dt_bias = nnx.Param(_time_step_bias(rngs.params(), num_heads))
        self.norm = RmsNorm(config.value_dim(shape))
        if conv_size:
            bound = 1 / math.sqrt(conv_size)  # PyTorch's for a depthwise convolution
            sizes = (conv_size, 2 * key_width + value_width)
            self.convolution = nnx.Param(jax.random.uniform(rngs.params(), sizes, jnp.float32, -bound, bound))

    @classmethod
    def from_config(cls, config: GatedDeltaNetConfig, shape: ModelShape, *, rngs: nnx.Rngs) -> "GatedDeltaNet":
        settings = dataclasses.asdict(config) | {"num_heads": config.heads(shape)}
        return cls(shape.width, dtype=shape.dtype, **settings, rngs=rngs)

    def mix(
        self,
        x: Float[Array, "B T D"],
        segments: SegmentInfo,
        memory: GatedDeltaNetCache | None = None,
        ahead: Ahead | None = None,
    ) -> tuple[Float[Array, "B T _"], GatedDeltaNetCache | None]:
        x = x if ahead is None else ahead.norm(x)  # of two projections
        heads, key_dim = self.config.heads(self.shape), self.config.key_dim(self.shape)
        key_width, value_width = heads * key_dim, self.out_proj.in_features
        widths = key_width, key_width, value_width
        projected, output_gate = project_groups(self.in_proj, x, widths, (value_width,))
        write, decay = (part.astype(jnp.float32) for part in project_parts(self.gate_proj, x, heads, heads))
        with jax.named_scope("convolution"):
            convolved = convolved_heads(
                projected,
                self.convolution[...] if self.config.conv_size else jnp.ones((1, sum(widths)), jnp.float32),
                segments,
                num_heads=heads,
                key_dim=key_dim,
                last_inputs=None if memory is None else memory.last_inputs,
                implementation="xla" if self.implementation == "xla" else None,
            )
        mixed = gated_delta_rule(
            convolved.query,
            convolved.key,
            convolved.value,
            -jnp.exp(_per_head(self.A_log)) * jax.nn.softplus(decay + _per_head(self.dt_bias)),
            jax.nn.sigmoid(write),
            segment_ids=None if segments.contiguous and memory is None else segments,
            initial_state=None if memory is None else memory.state,
            implementation=self.implementation,
        )
        with jax.named_scope("output_gate"):
            normed = self.norm(mixed.out.astype(jnp.float32)).reshape(*x.shape[:2], -1)
            gated = (normed * jax.nn.silu(output_gate.astype(jnp.float32))).astype(x.dtype)
        memory = None if memory is None else GatedDeltaNetCache(mixed.final_state, convolved.last_inputs)
        return gated, memory

    def init_memory(self, batch_size: int, capacity: int) -> GatedDeltaNetCache:
        del capacity  # the state has one size
        heads, key_dim, value_dim = (
            size(self.shape) for size in (self.config.heads, self.config.key_dim, self.config.value_dim)
        )
        inputs = (batch_size, max(self.config.conv_size - 1, 0), heads * (2 * key_dim + value_dim))
        return GatedDeltaNetCache(
            state=jnp.zeros((batch_size, heads, key_dim, value_dim), jnp.float32),
            last_inputs=jnp.zeros(inputs, self.shape.dtype),
        )

    def step_bytes(self, memory: GatedDeltaNetCache, position: int) -> int:
        return bytes_of(memory.state) + bytes_of(memory.last_inputs)


def _per_head(parameter: nnx.Param) -> Float32[Array, "1 1 N"]:
    return parameter[...].reshape(1, 1, -1)


def _time_step_bias(key: Array, num_heads: int) -> Float32[Array, " N"]:
    """Biases whose softplus is log-uniform between `_TIME_STEPS`."""
    low, high = (math.log(step) for step in _TIME_STEPS)
    step = jnp.exp(jax.random.uniform(key, (num_heads,), jnp.float32, low, high))
    return step + jnp.log(-jnp.expm1(-step))
