"""phi(x) = [m(x), m(-x)] in registers, half by half, and back: m is the softmax over a head or the positive part."""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.triton.problem import LOG2_E


def half_features(x: jax.Array, half: int, *, softmax: bool, real: jax.Array | None = None) -> jax.Array:
    """m(x), or m(-x) for half 1, in float32 of a tile [rows, H] laid out like an accumulator; 0 in rows not `real`."""
    sign = 1.0 - 2.0 * half
    if softmax:
        largest = jnp.min(x, axis=1) if half else jnp.max(x, axis=1)  # of 16-bit numbers two at once
        largest = _by_rows(largest.astype(jnp.float32) * (sign * LOG2_E), x.shape)
        weights = jnp.exp2(x.astype(jnp.float32) * (sign * LOG2_E) - largest)
        scale = 1.0 / jnp.sum(weights, axis=1)
        if real is not None:
            scale = jnp.where(real, scale, 0.0)
        return weights * _by_rows(scale, x.shape)
    features = jnp.maximum(x.astype(jnp.float32) * sign, 0.0)
    return features if real is None else features * _by_rows(jnp.where(real, 1.0, 0.0), x.shape)


def restored(features: jax.Array, *, softmax: bool) -> jax.Array:
    """Features in float32 that were rounded to 16 bits: those of a softmax sum up to 1 again, or are all 0."""
    features = features.astype(jnp.float32)
    if not softmax:
        return features
    total = jnp.sum(features, axis=1)
    return features * _by_rows(jnp.where(total > 0.0, 1.0 / total, 0.0), features.shape)


def pull_back(features: jax.Array, d_features: jax.Array, *, softmax: bool) -> jax.Array:
    """The gradient of x from f = m(x) and the gradient of f, all float32."""
    if softmax:
        mean = jnp.sum(features * d_features, axis=1)
        return features * (d_features - _by_rows(mean, features.shape))
    return jnp.where(features > 0.0, d_features, 0.0)


def _by_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return lax.broadcast_in_dim(x, shape, [0])
