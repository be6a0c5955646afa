"""phi(x) = [m(x), m(-x)] in registers, half by half, and back: m is the softmax over a head or the positive part.

A softmax is represented by its weights and their sum, so that it can be divided by where that costs least.
"""

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.launch.sizes import LOG2_E


def half_weights(x: jax.Array, half: int, *, softmax: bool) -> jax.Array:
    """m(x), or m(-x) for half 1, in float32 of a 16-bit tile [rows, H] laid out like an accumulator.

    A softmax is not divided by its sum yet; its largest weight is 1.
    """
    return half_weights_and_shift(x, half, softmax=softmax)[0]


def half_weights_and_shift(x: jax.Array, half: int, *, softmax: bool) -> tuple[jax.Array, jax.Array | None]:
    """As `half_weights`, and what was subtracted from the exponents of 2 of each row; None if nothing was."""
    sign = 1.0 - 2.0 * half
    if not softmax:
        return jnp.maximum(x.astype(jnp.float32) * sign, 0.0), None
    largest = jnp.min(x, axis=1) if half else jnp.max(x, axis=1)  # of 16-bit numbers two at once
    shift = largest.astype(jnp.float32) * (sign * LOG2_E)
    return jnp.exp2(x.astype(jnp.float32) * (sign * LOG2_E) - by_rows(shift, x)), shift


def features_by_logs(x: jax.Array, sign: jax.Array, logs: jax.Array | None) -> jax.Array:
    """As `half_features`, from the log2 of the sum of a row's exponentials, which is infinite where they are to be 0.

    A sign of 1 gives the first half, -1 the second; the positive part has no logs.
    """
    if logs is None:
        return jnp.maximum(x.astype(jnp.float32) * sign, 0.0)
    return jnp.exp2(x.astype(jnp.float32) * (sign * LOG2_E) - by_rows(logs, x))


def scales(weights: jax.Array, *, softmax: bool) -> jax.Array | None:
    """What rows of weights are multiplied by to be features; None where that is nothing."""
    return 1.0 / jnp.sum(weights, axis=1) if softmax else None


def half_features(x: jax.Array, half: int, *, softmax: bool, real: jax.Array | None = None) -> jax.Array:
    """As `half_weights`, but divided, and 0 in rows that are not `real`."""
    return half_features_and_logs(x, half, softmax=softmax, real=real)[0]


def half_features_and_logs(
    x: jax.Array, half: int, *, softmax: bool, real: jax.Array | None = None
) -> tuple[jax.Array, jax.Array | None]:
    """As `half_features`, and the log2 of the sum of each row's exponentials."""
    weights, shift = half_weights_and_shift(x, half, softmax=softmax)
    scale, logs = None, None
    if softmax:
        total = jnp.sum(weights, axis=1)
        scale, logs = 1.0 / total, shift + jnp.log(total) * LOG2_E
    if real is not None:
        scale = jnp.where(real, 1.0 if scale is None else scale, 0.0)
    return weights if scale is None else weights * by_rows(scale, weights), logs


def pull_back(weights: jax.Array, d_features: jax.Array, *, softmax: bool, total: jax.Array | None = None) -> jax.Array:
    """The gradient of x from weights of m(x), of which a row may be all 0, and the gradient of m(x), in float32.

    `total` is the sum of each row's weights, where there is one at hand.
    """
    if not softmax:
        return jnp.where(weights > 0.0, d_features, 0.0)
    if total is None:
        total = jnp.sum(weights, axis=1)
    scale = jnp.where(total > 0.0, 1.0 / total, 0.0)
    mean = jnp.sum(weights * d_features, axis=1) * scale
    return weights * (d_features * by_rows(scale, weights) - by_rows(mean * scale, weights))


def by_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """A number for every row, as a tile."""
    return lax.broadcast_in_dim(x, like.shape, [0])
