"""The MLP without gates: two products with a GELU between them, which kernels compute in their epilogues."""

import dataclasses
import functools
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from pallas_kernels.mlp import mosaic_gpu_tiling
from pallas_kernels.mlp.shape import MlpShape
from rat_jax.mesh import CONTEXT_AXIS, TENSOR_AXIS, num_parts
from rat_jax.ops import dispatch, platform
from rat_jax.ops.normed_product_xla import gelu, multiply_rows
from rat_jax.ops.remat import save_named
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
        where neither rows nor matrices are cut (mesh axes "context" and "tensor") and sizes are whole tiles (the tokens
        of all rows of a device a multiple of 2048, F of 256, D of 64 and at least 384), and "xla" elsewhere.

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
    rows = dispatch.rows_of_device(batch)
    shape = MlpShape(rows * tokens, width, up.shape[1], dtype.name, platform.expected_capability())

    def unsupported_reason(name: str) -> str | None:
        if (count := num_parts(CONTEXT_AXIS, TENSOR_AXIS)) > 1:
            return f"the mesh in use cuts rows or matrices over {count} devices; implementation 'xla' takes them"
        return mosaic_gpu_tiling.unsupported_reason(shape)

    order = _FASTEST_FIRST if tokens > 1 else ()
    x, up, down = (array.astype(dtype) for array in (x, up, down))
    if dispatch.choose(implementation, order, batch, unsupported_reason) == "xla":
        return multiply_rows(gelu(multiply_rows(x, up)), down)
    return _by_kernels(shape, implementation is None, x, up, down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernels(shape: MlpShape, fall_back: bool, x: Array, up: Array, down: Array) -> Array:
    return _forward(shape, fall_back, x, up, down)[0]


def _forward(shape: MlpShape, fall_back: bool, x: Array, up: Array, down: Array) -> tuple[Array, tuple[Array, ...]]:
    u, h = dispatch.run(Up("mosaic_gpu", shape), fall_back, x, up)
    u = save_named(u)
    return multiply_rows(h, down), (x, up, down, u)


def _backward(shape: MlpShape, fall_back: bool, kept: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array]:
    x, up, down, u = kept
    du, h = dispatch.run(DownBackward("mosaic_gpu", shape), fall_back, d_out, u, down)
    # Plain products: a mesh cuts the matrices' gradients as it cuts the matrices.
    return jnp.einsum("btf,df->btd", du, up), _sum_over_tokens(x, du), _sum_over_tokens(h, d_out)


_by_kernels.defvjp(_forward, _backward)


def _sum_over_tokens(left: Array, right: Array) -> Array:
    left, right = (x.reshape(-1, x.shape[-1]) for x in (left, right))
    return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())))


@dataclasses.dataclass(frozen=True)
class Up(dispatch.Kernel):
    """Of x and W_up: u = x W_up and gelu(u)."""

    implementation: str
    shape: MlpShape
    replicated: ClassVar[tuple[int, ...]] = (1,)
    num_differentiated: ClassVar[int] = 0

    def forward(self, x: Array, up: Array) -> tuple[tuple[Array, Array], None]:
        from pallas_kernels.mlp import mosaic_gpu  # imports Pallas, which takes a while

        u, h = mosaic_gpu.up(self.shape, x.reshape(self.shape.tokens, -1), up)
        return (u.reshape(*x.shape[:2], -1), h.reshape(*x.shape[:2], -1)), None

    def plain(self, x: Array, up: Array) -> tuple[Array, Array]:
        u = multiply_rows(x, up)
        return u, gelu(u)


@dataclasses.dataclass(frozen=True)
class DownBackward(dispatch.Kernel):
    """Of dy, u and W_down: (dy W_down^T) gelu'(u) and gelu(u)."""

    implementation: str
    shape: MlpShape
    replicated: ClassVar[tuple[int, ...]] = (2,)
    num_differentiated: ClassVar[int] = 0

    def forward(self, d_out: Array, u: Array, down: Array) -> tuple[tuple[Array, Array], None]:
        from pallas_kernels.mlp import mosaic_gpu

        flat_d_out, flat_u = (x.reshape(self.shape.tokens, -1) for x in (d_out, u))
        du, h = mosaic_gpu.down_backward(self.shape, flat_d_out, down, flat_u)
        return (du.reshape(u.shape), h.reshape(u.shape)), None

    def plain(self, d_out: Array, u: Array, down: Array) -> tuple[Array, Array]:
        h, pull_back = jax.vjp(gelu, u)
        return pull_back(jnp.einsum("btd,fd->btf", d_out, down))[0], h
