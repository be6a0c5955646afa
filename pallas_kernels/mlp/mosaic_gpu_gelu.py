"""GELU by the machine's approximate functions, as an epilogue of matrix products can afford it.

With P the normal distribution function, gelu(x) = x P(x). The logit of P is odd:

    P(x) = 1 / (1 + exp(-x p(x^2))) = (1 + tanh(x p(x^2) / 2)) / 2.

p is a polynomial fitted to |x| <= 4 such that the relative error of x P(x) there is at most 2.8e-4, a tenth of
bfloat16's roundoff. It grows from there on, where x P(x) is -1.3e-4 or less, or x but for as much. The machine's tanh
adds 2.4e-4 |x|, which for x < -2 is more than bfloat16's roundoff of the result.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.launch.sizes import LOG2_E

LOGIT = (1.59468543, 0.0740641317, -0.00060446799, -2.08850339e-05, 7.73090462e-07)
_LOG2_ROOT_2_PI = 0.5 * math.log2(2 * math.pi)


def _half_logit(x: jax.Array, factor: float) -> tuple[jax.Array, jax.Array]:
    """x p(x^2) times a factor, and x^2."""
    square = x * x
    highest, *others = (factor * c for c in reversed(LOGIT))
    polynomial = square * highest + others[0]
    for c in others[1:]:
        polynomial = polynomial * square + c
    return x * polynomial, square


def gelu(x: jax.Array, erf_by: str) -> jax.Array:
    """x P(x) of float32."""
    return x * _distribution(x, erf_by)[0]


def gelu_and_slope(x: jax.Array, erf_by: str) -> tuple[jax.Array, jax.Array]:
    """x P(x) and its derivative P(x) + x P'(x) of float32."""
    probability, square = _distribution(x, erf_by)
    density = jnp.exp2(square * (-0.5 * LOG2_E) - _LOG2_ROOT_2_PI)
    return x * probability, probability + x * density


def _distribution(x: jax.Array, erf_by: str) -> tuple[jax.Array, jax.Array]:
    """P(x) and x^2."""
    if erf_by == "tanh":
        argument, square = _half_logit(x, 0.5)
        return lax.tanh(argument) * 0.5 + 0.5, square
    argument, square = _half_logit(x, -LOG2_E)
    root = lax.rsqrt(jnp.exp2(argument) + 1.0)  # a quotient would be exact, and slow
    return root * root, square
