"""The normed sum in plain XLA: it runs everywhere; kernels are compared with it."""

import jax.numpy as jnp

from rat_jax.ops.normed_product_xla import inverse_root
from rat_jax.shapes import Array, Float, Float32


def norm_heads(
    x: Float[Array, "*axes N H"], scale: Float32[Array, " c"], epsilon: float
) -> Float32[Array, "*axes N H"]:
    """x / sqrt(mean(x^2) + epsilon) over the channels of each head, times a scale of all c = N H, in float32."""
    x = x.astype(jnp.float32)
    return x * inverse_root(x, epsilon) * scale.reshape(1, 1, *x.shape[2:])


def add(
    first: Float[Array, "B T N H"],
    second: Float[Array, "B T N H"],
    first_scale: Float32[Array, " c"],
    second_scale: Float32[Array, " c"],
    epsilon: float,
) -> Float[Array, "B T N H"]:
    """See `rat_jax.ops.normed_sum.normed_sum`."""
    normed = norm_heads(first, first_scale, epsilon), norm_heads(second, second_scale, epsilon)
    return sum(normed).astype(first.dtype)
