"""What the RNN mixing op gives."""

from typing import NamedTuple

from rat_jax.shapes import Array, Float, Float32


class RnnOutput(NamedTuple):
    """The mixed tokens and, where a state was given, the state after them."""

    out: Float[Array, "B T D"]
    state: Float32[Array, "B D"] | None
