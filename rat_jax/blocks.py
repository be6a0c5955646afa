"""The residual block: a mixer moves information between tokens, an MLP works on each token."""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.config import ModelConfig
from rat_jax.layers import NORM_EPSILON, Ahead, RmsNorm, has_matrix_alone, project_parts, projection
from rat_jax.mesh import TENSOR_AXIS, constrain_stream, num_parts
from rat_jax.mixers import MIXERS, kind_of
from rat_jax.mixers.base import MixerCache
from rat_jax.ops.between_mixers import NormedMatrix, between_mixers
from rat_jax.ops.mlp import gelu_mlp
from rat_jax.ops.normed_product_xla import gelu
from rat_jax.parameters import VECTOR, ParameterSpec
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float


class Mlp(nnx.Module):
    """W_2 gelu(W_1 x), or gated: W_2 (f(W_1 x) * W_3 x) with f gelu or silu (arXiv 2002.05202); no biases.

    The GELU is the exact (erf) one. One projection gives W_1 x and W_3 x in this order.
    """

    PARAMETERS: ClassVar[Mapping[str, ParameterSpec]] = {
        "up.kernel": ParameterSpec(("width", "mlp"), matmul=True),
        "down.kernel": ParameterSpec(("mlp", "width"), matmul=True),
    }

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        dtype = jnp.dtype(config.dtype)
        self.kind = config.mlp_kind
        self.hidden = config.mlp_hidden
        gates = 1 if self.kind == "gelu" else 2
        self.up = projection(config.width, gates * config.mlp_hidden, dtype, rngs)
        self.down = projection(config.mlp_hidden, config.width, dtype, rngs)

    def __call__(self, x: Float[Array, "B T D"], ahead: Ahead | None = None) -> Float[Array, "B T D"]:
        """Applies the MLP to every token, normed where something is `ahead`."""
        match self.kind:
            case "gelu":
                if num_parts(TENSOR_AXIS) == 1 and ahead is None:
                    return gelu_mlp(x, self.up.kernel[...], self.down.kernel[...], dtype=self.up.dtype)
                (units,) = project_parts(self.up, x, self.hidden, ahead=ahead)  # whose columns may be cut
                return self.down(gelu(units))
            case "geglu" | "swiglu":
                gate, value = project_parts(self.up, x, self.hidden, self.hidden, ahead=ahead)
                gate = gelu(gate) if self.kind == "geglu" else jax.nn.silu(gate.astype(jnp.float32)).astype(x.dtype)
                return self.down(gate * value)
            case _:
                raise ValueError(f"no MLP is called {self.kind!r}")


class ResidualBlock(nnx.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x))."""

    NORMS: ClassVar[Mapping[str, ParameterSpec]] = {"mixer_norm.scale": VECTOR, "mlp_norm.scale": VECTOR}

    def __init__(self, name: str, config: ModelConfig, *, rngs: nnx.Rngs):
        """Makes the block of a layer whose mixer has a name in `config.pattern`."""
        settings = config.mixers[name]
        self.mixer_norm = RmsNorm(config.width)
        self.mixer = MIXERS[kind_of(settings)].from_config(settings, config, rngs=rngs)
        self.mlp_norm = RmsNorm(config.width)
        self.mlp = Mlp(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T D"], segments: SegmentInfo, memory: MixerCache | None = None
    ) -> tuple[Float[Array, "B T D"], MixerCache | None]:
        """The block's output and, where the mixer's memory was given, the new one."""
        if x.shape[1] == 1:
            (x, _), memory = self.step(BlockInput(x), segments, memory)
            return x, memory
        with jax.named_scope("mixer"):
            x, normed = self.mixer_norm.beside_residual(x)
            mixed, memory = self.mixer.mix(normed, segments, memory)
            mixed = self.mixer.out_proj(mixed)
        with jax.named_scope("mlp"):
            x, normed = self.mlp_norm.beside_residual(x, mixed)
            x = constrain_stream(x + self.mlp(normed))
        return x, memory

    def step(
        self,
        given: "BlockInput",
        segments: SegmentInfo,
        memory: MixerCache | None = None,
        following: NormedMatrix | None = None,
    ) -> tuple["BlockInput", MixerCache | None]:
        """As `__call__`, for one token a row: what the next block is given, and the memory after the token if any.

        All between two mixers may be one launch, at the end of which `following` is multiplied.

        Args:
          given: from the block before.
          segments: of the tokens.
          memory: of the mixer.
          following: `first_product` of the next block; None: there is none.
        """
        with jax.named_scope("mixer"):
            ahead = Ahead(self.mixer_norm, given.product)
            mixed, memory = self.mixer.mix(given.x, segments, memory, ahead)
        if self.mlp.kind == "gelu" and num_parts(TENSOR_AXIS) == 1 and has_matrix_alone(self.mixer.out_proj):
            with jax.named_scope("between_mixers"):
                found = between_mixers(
                    mixed,
                    given.x,
                    self.mixer.out_proj.kernel[...],
                    NormedMatrix(self.mlp_norm.scale[...], self.mlp.up.kernel[...]),
                    self.mlp.down.kernel[...],
                    following,
                    epsilon=NORM_EPSILON,
                    dtype=self.mlp.up.dtype,
                )
            return BlockInput(*found), memory
        with jax.named_scope("mixer"):
            x = constrain_stream(given.x + self.mixer.out_proj(mixed))
        with jax.named_scope("mlp"):
            x = constrain_stream(x + self.mlp(x, Ahead(self.mlp_norm)))
        return BlockInput(x), memory

    @property
    def first_product(self) -> NormedMatrix | None:
        """All that a step does with its input but to add to it; None where that is more than one product.

        Where the mesh in use cuts heads, the mixer orders its matrix's columns by itself.
        """
        if not self.mixer.PROJECTS_ONCE or num_parts(TENSOR_AXIS) > 1 or not has_matrix_alone(self.mixer.in_proj):
            return None
        return NormedMatrix(self.mixer_norm.scale[...], self.mixer.in_proj.kernel[...])


class BlockInput(NamedTuple):
    """What a step of a block is given."""

    x: Float[Array, "B 1 D"]
    product: Float[Array, "B 1 _"] | None = None  # of the block's `first_product` and x, if it is there already
