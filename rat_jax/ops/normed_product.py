"""A root mean square norm and the product of its rows with a matrix, which decoding of few rows runs in one launch."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.normed_product import mosaic_gpu_tiling
from pallas_kernels.normed_product.shape import NormedProductShape
from rat_jax.ops import cut, dispatch, normed_product_xla, platform
from rat_jax.shapes import Array, Float, Float32

NormedProductImplementation = Literal["xla", "mosaic_gpu"]

_FASTEST_FIRST = ("mosaic_gpu",)


def normed_product(
    x: Float[Array, "B T D"],
    scale: Float32[Array, " D"],
    matrix: Float[Array, "D c"],
    *,
    epsilon: float,
    gelu: bool = False,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: NormedProductImplementation | None = None,
) -> Float[Array, "B T c"]:
    """out_t = x_t / sqrt(mean(x_t^2) + epsilon) * scale W, or the GELU of it (arXiv 1910.07467, 1606.08415).

    The norm is float32 and rounded to the dtype of x, then to `dtype`, in which the product takes place. The GELU is
    the exact (erf) one; kernels take it of the float32 sums, plain XLA of the rounded ones.

    Args:
      x: of any dtype.
      scale: of the channels.
      matrix: W, which is cast to `dtype`.
      epsilon: above 0.
      gelu: whether to take the GELU of the product.
      dtype: of the product and the result; None: that of x.
      implementation: None takes "mosaic_gpu" on a Hopper GPU for one token of at most 16 rows in bfloat16 or float16,
        outside of meshes of several devices, where strips of 64 of W's columns take most of the multiprocessors once,
        and "xla" elsewhere.

    Raises:
      ValueError: if shapes do not fit, or epsilon is not above 0.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, NormedProductImplementation)
    dispatch.check_floating(x=x, scale=scale, matrix=matrix)
    if x.ndim != 3 or matrix.ndim != 2 or x.shape[2:] != scale.shape or matrix.shape[:1] != scale.shape:
        raise ValueError(
            f"x must be [B, T, D], scale [D] and matrix [D, c], got {x.shape}, {scale.shape} and {matrix.shape}"
        )
    batch, tokens, inputs = x.shape
    dispatch.check_whole(1, rows=batch, tokens=tokens)
    if not epsilon > 0:
        raise ValueError(f"epsilon must be above 0, got {epsilon}")
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    shape = NormedProductShape(
        batch * tokens, inputs, matrix.shape[1], dtype.name, gelu=gelu, capability=platform.expected_capability()
    )

    def unsupported_reason(name: str) -> str | None:
        if (reason := cut.several_devices_reason()) is not None:
            return reason
        if x.dtype != dtype:
            return f"x is {x.dtype.name} and the product {dtype.name}; cast x, or take implementation 'xla'"
        return mosaic_gpu_tiling.unsupported_reason(shape)

    order = _FASTEST_FIRST if tokens == 1 and mosaic_gpu_tiling.fills_card(shape) else ()
    if dispatch.choose(implementation, order, batch, unsupported_reason) == "xla":
        return normed_product_xla.multiply(x, scale, matrix, epsilon, gelu, dtype)
    (out,) = dispatch.run(Multiply("mosaic_gpu", shape, epsilon), implementation is None, x, scale, matrix)
    return out


@dataclasses.dataclass(frozen=True)
class Multiply(dispatch.Kernel):
    """Of `x`, `scale` and `matrix`: the normed product; made for decoding, so that gradients are plain XLA's."""

    implementation: str
    shape: NormedProductShape
    epsilon: float
    replicated: ClassVar[tuple[int, ...]] = (1, 2)
    num_differentiated: ClassVar[int] = 0

    def forward(self, x: Array, scale: Array, matrix: Array) -> tuple[tuple[Array], None]:
        from pallas_kernels.normed_product import mosaic_gpu  # imports Pallas, which takes a while

        rows = x.reshape(self.shape.rows, self.shape.inputs)
        out = mosaic_gpu.multiply(self.shape, rows, scale, matrix.astype(self.shape.dtype), epsilon=self.epsilon)
        return (out.reshape(*x.shape[:2], -1),), None

    def plain(self, x: Array, scale: Array, matrix: Array) -> tuple[Array]:
        dtype = jnp.dtype(self.shape.dtype)
        return (normed_product_xla.multiply(x, scale, matrix, self.epsilon, self.shape.gelu, dtype),)
