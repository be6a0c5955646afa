"""What convolved heads give."""

from typing import NamedTuple

from rat_jax.shapes import Array, Float


class ConvolvedHeads(NamedTuple):
    """Queries, keys and values, and what the next tokens' convolutions will need where last inputs were given."""

    query: Float[Array, "B T N Hk"]
    key: Float[Array, "B T N Hk"]
    value: Float[Array, "B T N Hv"]
    last_inputs: Float[Array, "B earlier c"] | None
