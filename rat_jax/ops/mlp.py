"""The MLP without gates: two products with a GELU between them, which kernels compute in their epilogues."""

import dataclasses
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.mlp import mosaic_gpu_tiling
from pallas_kernels.mlp.shape import MlpShape
from rat_jax.mesh import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS, num_parts
from rat_jax.ops import dispatch, platform
from rat_jax.ops.normed_product_xla import gelu, multiply_rows
from rat_jax.shapes import Array, Float

MlpImplementation = Literal["xla", "mosaic_gpu"]

_FASTEST_FIRST = ("mosaic_gpu",)


def gelu_mlp(
    x: Float[Array, "B T D"],
    up: Float[Array, "D F"],
    down: Float[Array, "F D"],
    *,
    dtype: jax.typing.DTypeLike | None = None,
    implementation: MlpImplementation | None = None,
) -> Float[Array, "B T D"]:
    """y_t = gelu(x_t W_up) W_down, with the exact (erf) GELU (arXiv 1606.08415).

    All products take place in `dtype`. Kernels compute GELU by a polynomial whose relative error is below a tenth of
    bfloat16's roundoff down to x_t W_up = -4, and by the machine's tanh when gradients take it again. They keep
    x_t W_up for gradients, also with `remat="dots"`, and write it where none are wanted.

    Args:
      x: of any dtype.
      up: W_up, which is cast to `dtype`.
      down: W_down, as `up`.
      dtype: of the products and the result; None: that of x.
      implementation: None takes "mosaic_gpu" on a Hopper GPU for more than one token a row in bfloat16 or float16,
        outside of meshes of several devices, where sizes are whole tiles (the tokens of all rows a multiple of 2048,
        F of 256, D of 64 and at least 384), and "xla" elsewhere.

    Raises:
      ValueError: if shapes do not fit.
      UnsupportedError: if a named implementation cannot run the call; the message says why and what comes nearest.
    """
    dispatch.check_implementation(implementation, MlpImplementation)
    dispatch.check_floating(x=x, up=up, down=down)
    if x.ndim != 3 or up.ndim != 2 or x.shape[2:] != up.shape[:1] or down.shape != up.shape[::-1]:
        raise ValueError(f"x must be [B, T, D], up [D, F] and down [F, D], got {x.shape}, {up.shape} and {down.shape}")
    batch, tokens, width = x.shape
    dispatch.check_whole(1, rows=batch, tokens=tokens)
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    shape = MlpShape(batch * tokens, width, up.shape[1], dtype.name, platform.expected_capability())

    def unsupported_reason(name: str) -> str | None:
        if (count := num_parts(*BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS)) > 1:
            return f"it runs on one device, and the mesh in use cuts arrays over {count}; implementation 'xla' does"
        return mosaic_gpu_tiling.unsupported_reason(shape)

    order = _FASTEST_FIRST if tokens > 1 else ()
    if dispatch.choose(implementation, order, batch, unsupported_reason) == "xla":
        return _by_xla(x, up, down, dtype)
    arguments = (array.astype(dtype) for array in (x, up, down))
    (out,) = dispatch.run(GeluMlp("mosaic_gpu", shape), implementation is None, *arguments)
    return out


def _by_xla(x: Array, up: Array, down: Array, dtype: jnp.dtype) -> Float[Array, "B T D"]:
    return multiply_rows(gelu(multiply_rows(x.astype(dtype), up.astype(dtype))), down.astype(dtype))


@dataclasses.dataclass(frozen=True)
class GeluMlp(dispatch.Kernel):
    """Of `x`, `up` and `down`, all of one dtype: the MLP's result. Products without a GELU are XLA's."""

    implementation: str
    shape: MlpShape
    replicated: ClassVar[tuple[int, ...]] = (1, 2)
    num_differentiated: ClassVar[int] = 3

    def forward(self, x: Array, up: Array, down: Array) -> tuple[tuple[Array], Array]:
        from pallas_kernels.mlp import mosaic_gpu  # imports Pallas, which takes a while

        u, h = mosaic_gpu.up(self.shape, self._flat(x), up)
        return ((h @ down).reshape(x.shape),), u

    def plain(self, x: Array, up: Array, down: Array) -> tuple[Array]:
        return (_by_xla(x, up, down, x.dtype),)

    def backward(self, arguments, saved, residuals, d_results) -> tuple[Array, Array, Array]:
        from pallas_kernels.mlp import mosaic_gpu

        (x, up, down), u = arguments, residuals
        d_out = self._flat(d_results[0])
        du, h = mosaic_gpu.down_backward(self.shape, d_out, down, u)
        dx = jax.lax.dot_general(du, up, (((1,), (1,)), ((), ())))
        return dx.reshape(x.shape), _sum_over_tokens(self._flat(x), du), _sum_over_tokens(h, d_out)

    def _flat(self, x: Array) -> Array:
        return x.reshape(self.shape.tokens, self.shape.width)


def _sum_over_tokens(left: Array, right: Array) -> Array:
    return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))
