"""phi(x) = [m(x), m(-x)] in registers, half by half, and back: m is the softmax over a head or the positive part."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.triton.problem import LOG2_E


def half_features(x: jax.Array, sign: jax.Array | float, *, softmax: bool, real: jax.Array | None = None) -> jax.Array:
    """m(sign x) in float32 of a tile [rows, H] laid out like an accumulator; 0 in rows that are not `real`."""
    x = x.astype(jnp.float32)
    if softmax:
        x = x * (sign * LOG2_E)
        weights = jnp.exp2(x - _by_rows(jnp.max(x, axis=1), x.shape))
        scale = 1.0 / jnp.sum(weights, axis=1)
        if real is not None:
            scale = jnp.where(real, scale, 0.0)
        return weights * _by_rows(scale, x.shape)
    features = jnp.maximum(x * sign, 0.0)
    return features if real is None else features * _by_rows(jnp.where(real, 1.0, 0.0), x.shape)


def pull_back(features: jax.Array, d_features: jax.Array, *, softmax: bool) -> jax.Array:
    """The gradient of x from f = m(x) and the gradient of f, all float32."""
    if softmax:
        mean = jnp.sum(features * d_features, axis=1)
        return features * (d_features - _by_rows(mean, features.shape))
    return jnp.where(features > 0.0, d_features, 0.0)


def _by_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])
