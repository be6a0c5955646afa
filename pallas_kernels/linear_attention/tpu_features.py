"""phi(x) = [m(x), m(-x)] inside a kernel, and back: m is the softmax over a head's channels or the positive part."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention.tpu_tiling import Tiling

_RECIPROCAL = pltpu.reciprocal if hasattr(pltpu, "reciprocal") else pl.reciprocal  # where jax 0.10 has it
_MASKED = -1e30  # of a channel that is none; finite, so that no difference of two is undefined


class Features(NamedTuple):
    """Both halves, float32 [rows, lanes]; zero in the lanes that are no channels."""

    positive: jax.Array  # m(x)
    negative: jax.Array  # m(-x)


def features(tiling: Tiling, x: jax.Array) -> Features:
    """Both halves of x [rows, lanes]."""
    x = x.astype(jnp.float32)
    if tiling.shape.feature_map == "relu":
        return Features(jnp.maximum(x, 0.0), jnp.maximum(-x, 0.0))
    x = x.T  # sums over channels then go from register to register; across lanes they took most of the forward kernel

    def softmax(x):
        if tiling.shape.head_dim < tiling.lanes:
            x = jnp.where(lax.broadcasted_iota(jnp.int32, x.shape, 0) < tiling.shape.head_dim, x, _MASKED)
        x = jnp.exp(x - jnp.max(x, axis=0, keepdims=True))
        return x * _reciprocal(tiling, jnp.sum(x, axis=0, keepdims=True))

    return Features(softmax(x).T, softmax(-x).T)


def _reciprocal(tiling: Tiling, x: jax.Array) -> jax.Array:
    """1 / x for x from 1 to H; a division minds infinities too, which made up half of the kernel's arithmetic."""
    guess = _RECIPROCAL(x, approx=True)  # a bfloat16's digits or more; each step doubles their number
    for _ in range(1 if tiling.dtype == jnp.bfloat16 else 2):
        guess *= 2.0 - x * guess
    return guess


def joined(tiling: Tiling, halves: Features) -> jax.Array:
    """[rows, features] in the kernel's dtype."""
    if tiling.folded:
        return (halves.positive + pltpu.roll(halves.negative, tiling.shape.head_dim, 1)).astype(tiling.dtype)
    return jnp.concatenate(halves, axis=1).astype(tiling.dtype)


def pull_back(tiling: Tiling, halves: Features, d_features: jax.Array) -> jax.Array:
    """Gradient of x, float32 [rows, lanes], from that of `joined`, float32 [rows, features]."""
    if tiling.folded:  # lanes of the other half meet features of zero below
        d_positive, d_negative = d_features, pltpu.roll(d_features, tiling.lanes - tiling.shape.head_dim, 1)
    else:
        d_positive, d_negative = d_features[:, : tiling.lanes], d_features[:, tiling.lanes :]
    if tiling.shape.feature_map == "relu":
        zero = jnp.zeros_like(d_positive)
        return jnp.where(halves.positive > 0, d_positive, zero) - jnp.where(halves.negative > 0, d_negative, zero)

    def through_softmax(weights, d_weights):
        return weights * (d_weights - jnp.sum(weights * d_weights, axis=1, keepdims=True))

    return through_softmax(halves.positive, d_positive) - through_softmax(halves.negative, d_negative)
