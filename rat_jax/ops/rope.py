"""Rotary position embedding (arXiv 2104.09864), the rotate-half form."""

import jax.numpy as jnp

from rat_jax.ops import context
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32, Int


def rotate_tokens(x: Float[Array, "B T *axes H"], segments: SegmentInfo, base: float) -> Float[Array, "B T *axes H"]:
    """`rotate` by the positions of `segments`; where all rows have the same, angles are those of one row."""
    if segments.contiguous and context.num_parts() == 1:
        return rotate(x, jnp.arange(x.shape[1], dtype=jnp.int32)[None], base)
    return rotate(x, segments.positions, base)


def rotate(x: Float[Array, "B T *axes H"], positions: Int[Array, "b T"], base: float) -> Float[Array, "B T *axes H"]:
    """Rotates the channel pairs (i, i + H/2) of `x` by the angles positions * base**(-2 i / H).

    Angles and products are float32; the result has the dtype of `x`. H must be even, and b is B, or 1 for positions of
    all rows.
    """
    cos, sin = angles(positions, x.shape[-1], base)
    shape = cos.shape[:2] + (1,) * (x.ndim - 3) + cos.shape[2:]
    cos, sin = cos.reshape(shape), sin.reshape(shape)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def angles(
    positions: Int[Array, "B T"], head_dim: int, base: float
) -> tuple[Float32[Array, "B T {head_dim}//2"], Float32[Array, "B T {head_dim}//2"]]:
    """Cosine and sine of every rotation angle."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    phases = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    return jnp.cos(phases), jnp.sin(phases)
