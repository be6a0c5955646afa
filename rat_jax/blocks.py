"""The residual block: a mixer moves information between tokens, an MLP works on each token."""

from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from rat_jax.config import ModelConfig
from rat_jax.layers import RmsNorm, project_gelu, project_parts, projection
from rat_jax.mesh import TENSOR_AXIS, constrain_stream, num_parts
from rat_jax.mixers import MIXERS, kind_of
from rat_jax.mixers.base import MixerCache
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

    def __call__(self, x: Float[Array, "B T D"], norm: RmsNorm | None = None) -> Float[Array, "B T D"]:
        """Applies the MLP to every token, normed where there is a norm."""
        match self.kind:
            case "gelu":
                if norm is not None or num_parts(TENSOR_AXIS) > 1:  # which may be in the same launch; columns are cut
                    return self.down(project_gelu(self.up, x, norm))
                return gelu_mlp(x, self.up.kernel[...], self.down.kernel[...], dtype=self.up.dtype)
            case "geglu" | "swiglu":
                gate, value = project_parts(self.up, x, self.hidden, self.hidden, norm=norm)
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
        with jax.named_scope("mixer"):
            x, normed, norm = _ahead(self.mixer_norm, x)
            mixed, memory = self.mixer.mix(normed, segments, memory, norm)
        with jax.named_scope("mlp"):
            x, normed, norm = _ahead(self.mlp_norm, x, mixed)
            x = constrain_stream(x + self.mlp(normed, norm))
        return x, memory


def _ahead(
    norm: RmsNorm, x: Float[Array, "B T D"], added: Float[Array, "B T D"] | None = None
) -> tuple[Array, Array, RmsNorm | None]:
    """What goes around a layer, what goes into it, and the norm that the layer still has to apply: to one token."""
    if x.shape[1] > 1:
        return *norm.beside_residual(x, added), None
    x = x if added is None else constrain_stream(x + added)
    return x, x, norm
