"""Convolved heads in plain XLA: it runs everywhere; kernels are compared with it."""

import jax
import jax.numpy as jnp

from pallas_kernels.convolved_heads.shape import LENGTH_EPSILON
from rat_jax.ops.convolved_heads_types import ConvolvedHeads
from rat_jax.ops.short_convolution import short_convolution
from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32


def convolve(
    projected: Float[Array, "B T c"],
    taps: Float32[Array, "taps c"],
    segments: SegmentInfo,
    num_heads: int,
    key_dim: int,
    last_inputs: Float[Array, "B earlier c"] | None = None,
) -> ConvolvedHeads:
    """See `rat_jax.ops.convolved_heads.convolved_heads`."""
    ends = [num_heads * key_dim, 2 * num_heads * key_dim]
    parts, kernels = jnp.split(projected, ends, axis=-1), jnp.split(taps, ends, axis=-1)
    earlier = [None] * 3 if last_inputs is None else jnp.split(last_inputs, ends, axis=-1)
    convolved = [
        short_convolution(part, kernel, segments, last)
        for part, kernel, last in zip(parts, kernels, earlier, strict=True)
    ]
    heads = [jax.nn.silu(x.out).reshape(*x.out.shape[:2], num_heads, -1) for x in convolved]
    results = _unit_length(heads[0]) * key_dim**-0.5, _unit_length(heads[1]), heads[2]
    last_inputs = None if last_inputs is None else jnp.concatenate([x.last_inputs for x in convolved], axis=-1)
    return ConvolvedHeads(*(x.astype(projected.dtype) for x in results), last_inputs)


def _unit_length(x: Float32[Array, "*axes H"]) -> Float32[Array, "*axes H"]:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + LENGTH_EPSILON)
