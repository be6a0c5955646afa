"""The norm in front of a layer, beside what goes around it: the sum before both and their gradients in one pass."""

import dataclasses
import functools
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.residual_norm import triton_tiling
from pallas_kernels.residual_norm.shape import ResidualNormShape
from rat_jax.mesh import constrain_stream
from rat_jax.ops import cut, dispatch
from rat_jax.ops.normed_product_xla import rms_norm
from rat_jax.shapes import Array, Float, Float32

ResidualNormImplementation = Literal["xla", "triton"]

_FASTEST_FIRST = ("triton",)


class ResidualNormOutput(NamedTuple):
    """What goes around a layer and what goes into it."""

    around: Float[Array, "B T D"]  # x, with what is added
    normed: Float[Array, "B T D"]


def residual_norm(
    x: Float[Array, "B T D"],
    scale: Float32[Array, " D"],
    *,
    epsilon: float,
    added: Float[Array, "B T D"] | None = None,
    implementation: ResidualNormImplementation | None = None,
) -> ResidualNormOutput:
    """u = x + added, and y = u / sqrt(mean(u^2) + epsilon) * scale over the channels (arXiv 1910.07467), in float32.

    A kernel adds and norms in one pass; without a sum plain XLA does, which joins the norm with what surrounds it. In
    the backward pass a kernel takes the gradients of both results, sums them up and returns that of x, which is that of
    `added` too.

    Args:
      x: the results have its dtype.
      scale: of every channel.
      epsilon: above 0.
      added: what the layer before gave, in the dtype of x; None: u is x.
      implementation: None takes the fastest kernel of the platform that the program is lowered for where it takes the
        call, and "xla" elsewhere, for one token and where a mesh cuts tokens or heads.

    Raises:
      ValueError: if shapes or dtypes do not fit, or epsilon is not above 0.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, ResidualNormImplementation)
    dispatch.check_floating(x=x, scale=scale)
    if x.ndim != 3 or scale.shape != x.shape[2:]:
        raise ValueError(f"x must be [B, T, D] and scale [D], got {x.shape} and {scale.shape}")
    if added is not None and (added.shape, added.dtype) != (x.shape, x.dtype):
        raise ValueError(f"added must be as x is, {x.dtype} {x.shape}, got {added.dtype} {added.shape}")
    batch, tokens, width = x.shape
    dispatch.check_whole(1, rows=batch, tokens=tokens)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    shape = ResidualNormShape(dispatch.rows_of_device(batch) * tokens, width, x.dtype.name, epsilon)

    def unsupported_reason(name: str) -> str | None:
        if cut.is_cut():
            return "the mesh in use cuts tokens or heads; implementation 'xla' takes them"
        return triton_tiling.unsupported_reason(shape)

    order = _FASTEST_FIRST if tokens > 1 else ()
    chosen = dispatch.choose(implementation, order, batch, unsupported_reason)
    if chosen == "xla":
        around = x if added is None else constrain_stream(x + added)
        return ResidualNormOutput(around, rms_norm(around, scale, epsilon))
    kernels = Kernels(None if added is None else Forward(chosen, shape), Backward(chosen, shape))
    return ResidualNormOutput(*_by_kernels(kernels, implementation is None, x, added, scale))


class Kernels(NamedTuple):
    """Of both passes."""

    forward: "Forward | None"  # None: nothing is added
    backward: "Backward"


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernels(kernels: Kernels, fall_back: bool, x: Array, added: Array | None, scale: Array) -> tuple[Array, Array]:
    return _forward(kernels, fall_back, x, added, scale)[0]


def _forward(kernels: Kernels, fall_back: bool, x: Array, added: Array | None, scale: Array):
    if kernels.forward is None:
        around, normed = x, rms_norm(x, scale, kernels.backward.shape.epsilon)
    else:
        around, normed = dispatch.run(kernels.forward, fall_back, x, added, scale)
    return (around, normed), (around, scale)


def _backward(kernels: Kernels, fall_back: bool, kept: tuple[Array, Array], d_results: tuple[Array, Array]):
    d_x, d_scales = dispatch.run(kernels.backward, fall_back, *d_results, *kept)
    d_added = None if kernels.forward is None else d_x
    return d_x, d_added, jnp.sum(d_scales, axis=0).astype(kept[1].dtype)


_by_kernels.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Forward(dispatch.Kernel):
    """Of x, what is added and the scale: both results."""

    implementation: str
    shape: ResidualNormShape
    replicated: ClassVar[tuple[int, ...]] = (2,)
    num_differentiated: ClassVar[int] = 0

    def forward(self, x: Array, added: Array, scale: Array) -> tuple[tuple[Array, Array], None]:
        from pallas_kernels.residual_norm import triton  # imports Triton, which machines without a GPU may lack

        flat = (array.reshape(self.shape.tokens, -1) for array in (x, added))
        around, normed = triton.forward(self.shape, *flat, scale.astype(jnp.float32))
        return (around.reshape(x.shape), normed.reshape(x.shape)), None

    def plain(self, x: Array, added: Array, scale: Array) -> tuple[Array, Array]:
        around = x + added
        return around, rms_norm(around, scale, self.shape.epsilon)


@dataclasses.dataclass(frozen=True)
class Backward(dispatch.Kernel):
    """Of both results' gradients, u and the scale: the gradients of u and, of a device's tokens, of the scale."""

    implementation: str
    shape: ResidualNormShape
    replicated: ClassVar[tuple[int, ...]] = (3,)
    num_differentiated: ClassVar[int] = 0

    def forward(self, d_around: Array, d_normed: Array, x: Array, scale: Array) -> tuple[tuple[Array, Array], None]:
        from pallas_kernels.residual_norm import triton

        flat = (array.reshape(self.shape.tokens, -1) for array in (d_around, d_normed, x))
        d_x, d_scale = triton.backward(self.shape, *flat, scale.astype(jnp.float32))
        return (d_x.reshape(x.shape), d_scale[None]), None

    def plain(self, d_around: Array, d_normed: Array, x: Array, scale: Array) -> tuple[Array, Float32[Array, "1 D"]]:
        _, pull_back = jax.vjp(lambda x, scale: rms_norm(x, scale, self.shape.epsilon), x, scale)
        d_x, d_scale = pull_back(d_normed)
        return d_around + d_x, d_scale.astype(jnp.float32)[None]
