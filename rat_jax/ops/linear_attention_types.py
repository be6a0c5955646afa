"""What all implementations of linear attention share."""

from typing import NamedTuple

from pallas_kernels.linear_attention.shape import FeatureMap
from rat_jax.shapes import Array, Float, Float32

__all__ = ["FeatureMap", "LinearAttentionOutput"]


class LinearAttentionOutput(NamedTuple):
    """What the queries read, and what the keys and values of the last document have summed up to."""

    out: Float[Array, "B T N H"]
    state: Float32[Array, "B K E H"]
