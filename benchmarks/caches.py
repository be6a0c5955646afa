"""Caches of random numbers: measurements start in the middle of a row without reading the tokens before."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from rat_jax.shapes import Array


def random_contents(shapes: Any) -> Any:
    """A cache of these shapes: random numbers, the same in every batch row, and zeros for integers."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return jax.tree.unflatten(tree, [_random(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)])


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))  # one program for all layers
def _random(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    if not jnp.issubdtype(dtype, jnp.floating):
        return jnp.zeros(shape, dtype)
    return jnp.broadcast_to(jax.random.normal(key, (1, *shape[1:]), dtype), shape)
