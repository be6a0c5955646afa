"""What all bodies of linear attention agree on."""

from typing import Literal, NamedTuple

from rat_jax.shapes import Array, Float, Float32

FeatureMap = Literal["softmax", "relu"]


class LinearAttentionOutput(NamedTuple):
    """What the queries read, and what the keys and values of the last document have summed up to."""

    out: Float[Array, "B T N H"]
    state: Float32[Array, "B K 2*H H"]
