"""What the gated delta rule gives."""

from typing import NamedTuple

from rat_jax.shapes import Array, Float, Float32


class GatedDeltaRuleOutput(NamedTuple):
    """What the queries read, and the state after the last token of each row."""

    out: Float[Array, "B T N Hv"]
    final_state: Float32[Array, "B N Hk Hv"]
