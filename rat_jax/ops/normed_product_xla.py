"""Norm, product and GELU by XLA; modules take each by itself too."""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from rat_jax.ops import platform
from rat_jax.shapes import Array, Float, Float32


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_norm(x: Float[Array, "*axes D"], scale: Float32[Array, " D"], epsilon: float) -> Float[Array, "*axes D"]:
    """x / sqrt(mean(x^2) + epsilon) * scale over the channels (arXiv 1910.07467), in float32, returned in x's dtype.

    With i the inverse root and g the scale times the gradient, that of x is i (g - x i^2 mean(g x)): both means are
    taken in one reading of x.
    """
    return _norm(x, scale, epsilon)


def _norm(x: Array, scale: Array, epsilon: float) -> Array:
    x32 = x.astype(jnp.float32)
    return (x32 * inverse_root(x32, epsilon) * scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def inverse_root(x32: Array, epsilon: float) -> Array:
    """1 / sqrt(mean(x^2) + epsilon) over the last axis."""
    return jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + epsilon)


def _norm_forward(x: Array, scale: Array, epsilon: float) -> tuple[Array, tuple[Array, Array]]:
    return _norm(x, scale, epsilon), (x, scale)


def _norm_backward(epsilon: float, kept: tuple[Array, Array], d_out: Array) -> tuple[Array, Array]:
    x, scale = kept
    x32, d_out = x.astype(jnp.float32), d_out.astype(jnp.float32)
    inverse = inverse_root(x32, epsilon)
    scaled = d_out * scale.reshape((1,) * (x.ndim - 1) + (-1,))
    shared = jnp.square(inverse) * jnp.mean(scaled * x32, axis=-1, keepdims=True)
    d_scale = jnp.sum(d_out * (x32 * inverse), axis=tuple(range(x.ndim - 1)))
    return (inverse * (scaled - x32 * shared)).astype(x.dtype), d_scale.astype(scale.dtype)


rms_norm.defvjp(_norm_forward, _norm_backward)


def gelu(x: Array) -> Array:
    """x times the normal distribution function; by erf, which costs a CPU a third of `jax.nn.gelu`'s erfc."""
    x32 = x.astype(jnp.float32)
    return (0.5 * x32 * (1.0 + jax.lax.erf(x32 * math.sqrt(0.5)))).astype(x.dtype)


def multiply_rows(rows: Array, matrix: Array, dimension_numbers: Any = None, **options: Any) -> Array:
    """`jax.lax.dot_general` of [..., D] and a matrix.

    A single row is taken twice where a GPU is expected: XLA makes element-wise products and a sum of one row times some
    matrices, which takes three times as long as the product of two.
    """
    dimension_numbers = dimension_numbers or (((rows.ndim - 1,), (0,)), ((), ()))
    if math.prod(rows.shape[:-1]) != 1 or platform.expected_platform() in ("cpu", "tpu"):
        return jax.lax.dot_general(rows, matrix, dimension_numbers, **options)
    twice = jnp.concatenate([rows, rows], axis=-2)
    return jax.lax.dot_general(twice, matrix, dimension_numbers, **options)[..., :1, :]


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply_parts(rows: Float[Array, "*axes D"], matrix: Float[Array, "D c"], sizes: tuple) -> list:
    """`multiply_rows` as arrays of so many columns each, which lie by themselves.

    Their gradients are put together once, into an array that both products of the backward pass read: left alone, XLA
    writes the parts for one of them and all of it for the other.
    """
    return _products(rows, matrix, sizes)


def _products(rows: Array, matrix: Array, sizes: tuple) -> list:
    return [multiply_rows(rows, part) for part in jnp.split(matrix, list(itertools.accumulate(sizes))[:-1], axis=1)]


def _multiply_parts_forward(rows: Array, matrix: Array, sizes: tuple):
    return _products(rows, matrix, sizes), (rows, matrix)  # in the open, so that `jax.checkpoint` may save the products


def _multiply_parts_backward(sizes: tuple, kept: tuple[Array, Array], d_parts: list) -> tuple[Array, Array]:
    del sizes
    rows, matrix = kept
    d_out = jax.lax.optimization_barrier(jnp.concatenate(d_parts, axis=-1))
    (d_rows,) = jax.linear_transpose(lambda rows: multiply_rows(rows, matrix), rows)(d_out)
    (d_matrix,) = jax.linear_transpose(lambda matrix: multiply_rows(rows, matrix), matrix)(d_out)
    return d_rows, d_matrix


multiply_parts.defvjp(_multiply_parts_forward, _multiply_parts_backward)


def multiply(
    x: Float[Array, "B T D"],
    scale: Float32[Array, " D"],
    matrix: Float[Array, "D c"],
    epsilon: float,
    with_gelu: bool,
    dtype: jnp.dtype,
) -> Float[Array, "B T c"]:
    """See `rat_jax.ops.normed_product.normed_product`."""
    out = multiply_rows(rms_norm(x, scale, epsilon).astype(dtype), matrix.astype(dtype))
    return gelu(out) if with_gelu else out
