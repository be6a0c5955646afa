"""Angles of RoPE: by chunk index, for the halves of a head."""

import jax
import jax.numpy as jnp


def rotation(indices: jax.Array, head_dim: int, rope_base: float | None) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine [X, H / 2] float32 of rotations by `indices` [X]; placeholders without RoPE.

    Channel i turns with channel i + H / 2 by indices * rope_base^(-2 i / H).
    """
    if rope_base is None:
        return (jnp.zeros((1, 1), jnp.float32),) * 2
    frequencies = rope_base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    phases = indices.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(phases), jnp.sin(phases)
