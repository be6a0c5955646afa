"""The norm in front of a layer, and what goes around it: their gradients meet in one pass where a kernel runs."""

import dataclasses
import functools
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.residual_norm import triton_tiling
from pallas_kernels.residual_norm.shape import ResidualNormShape
from rat_jax.ops import cut, dispatch
from rat_jax.ops.normed_product_xla import rms_norm
from rat_jax.shapes import Array, Float, Float32

ResidualNormImplementation = Literal["xla", "triton"]

_FASTEST_FIRST = ("triton",)


class ResidualNormOutput(NamedTuple):
    """What goes around a layer and what goes into it."""

    around: Float[Array, "B T D"]  # x itself
    normed: Float[Array, "B T D"]


def residual_norm(
    x: Float[Array, "B T D"],
    scale: Float32[Array, " D"],
    *,
    epsilon: float,
    implementation: ResidualNormImplementation | None = None,
) -> ResidualNormOutput:
    """x, and y = x / sqrt(mean(x^2) + epsilon) * scale over the channels (arXiv 1910.07467), in float32.

    The values are plain XLA's, which joins the norm with what surrounds it; a kernel takes the gradients of both
    results, sums them up and returns that of x.

    Args:
      x: the result has its dtype.
      scale: of every channel.
      epsilon: above 0.
      implementation: of the backward pass. None takes the fastest kernel of the platform that the program is lowered
        for where it takes the call, and "xla" elsewhere, for one token and where a mesh cuts tokens or heads.

    Raises:
      ValueError: if shapes do not fit, or epsilon is not above 0.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, ResidualNormImplementation)
    dispatch.check_floating(x=x, scale=scale)
    if x.ndim != 3 or scale.shape != x.shape[2:]:
        raise ValueError(f"x must be [B, T, D] and scale [D], got {x.shape} and {scale.shape}")
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
        return ResidualNormOutput(x, rms_norm(x, scale, epsilon))
    return ResidualNormOutput(*_by_kernel(Backward(chosen, shape), implementation is None, x, scale))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(kernel: "Backward", fall_back: bool, x: Array, scale: Array) -> tuple[Array, Array]:
    return _forward(kernel, fall_back, x, scale)[0]


def _forward(kernel: "Backward", fall_back: bool, x: Array, scale: Array):
    return (x, rms_norm(x, scale, kernel.shape.epsilon)), (x, scale)


def _backward(kernel: "Backward", fall_back: bool, kept: tuple[Array, Array], d_results: tuple[Array, Array]):
    d_x, d_scales = dispatch.run(kernel, fall_back, *d_results, *kept)
    return d_x, jnp.sum(d_scales, axis=0).astype(kept[1].dtype)


_by_kernel.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Backward(dispatch.Kernel):
    """Of both results' gradients, x and its scale: the gradients of x and, of a device's tokens, of the scale."""

    implementation: str
    shape: ResidualNormShape
    replicated: ClassVar[tuple[int, ...]] = (3,)
    num_differentiated: ClassVar[int] = 0

    def forward(self, d_around: Array, d_normed: Array, x: Array, scale: Array) -> tuple[tuple[Array, Array], None]:
        from pallas_kernels.residual_norm import triton  # imports Triton, which machines without a GPU may lack

        flat = (array.reshape(self.shape.tokens, -1) for array in (d_around, d_normed, x))
        d_x, d_scale = triton.backward(self.shape, *flat, scale.astype(jnp.float32))
        return (d_x.reshape(x.shape), d_scale[None]), None

    def plain(self, d_around: Array, d_normed: Array, x: Array, scale: Array) -> tuple[Array, Float32[Array, "1 D"]]:
        _, pull_back = jax.vjp(lambda x, scale: rms_norm(x, scale, self.shape.epsilon), x, scale)
        d_x, d_scale = pull_back(d_normed)
        return d_around + d_x, d_scale.astype(jnp.float32)[None]
