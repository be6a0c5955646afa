"""Attention of the tokens of a part to all keys of earlier parts of their rows, where rows are one document each.

cuDNN's attention without a mask takes the keys of one other part after the other; what comes of later parts is left
out. The functions are those of `rat_jax.ops.document_attention`. Every part does the work of the last one: keys are so
few here that queries would be more to exchange (`rat_jax.ops.balanced_parts` exchanges them).
"""

import jax
import jax.numpy as jnp

from rat_jax.mesh import CONTEXT_AXIS
from rat_jax.ops import block_attention, context
from rat_jax.ops.document_attention import MASKED, Attended, Gradients, join
from rat_jax.shapes import Array, Bool, Float, Float32, Int


def attend(query: Float[Array, "B T N H"], key: Float[Array, "B S K H"], value: Float[Array, "B S K H"]) -> Attended:
    """As `document_attention.attend`, of the keys of all parts, of which earlier ones are seen."""

    def add_part(sums: Attended, distance: Int[Array, ""]) -> tuple[Attended, None]:
        part, is_earlier = _part(distance)
        found = block_attention.attend("cudnn", query, *context.of_part((key, value), part), None, None)
        seen = jnp.where(is_earlier, found.log_sum_exp, MASKED)
        return join(sums, found._replace(log_sum_exp=seen)), None

    return jax.lax.scan(add_part, Attended.nothing(query), _distances())[0]


def gradients(
    query: Float[Array, "B T N H"],
    key: Float[Array, "B S K H"],
    value: Float[Array, "B S K H"],
    log_sum_exp: Float32[Array, "B N T"],
    delta: Float32[Array, "B N T"],
    d_out: Float[Array, "B T N H"],
) -> Gradients:
    """As `document_attention.gradients`, of the keys of all parts, of which earlier ones are seen."""

    def add_part(sums: Gradients, distance: Int[Array, ""]) -> tuple[Gradients, None]:
        part, is_earlier = _part(distance)
        rows = log_sum_exp, delta, jnp.where(is_earlier, d_out, 0)
        found = block_attention.gradients("cudnn", query, *context.of_part((key, value), part), None, None, *rows)
        d_key, d_value = (
            context.with_part(total, x, part) for total, x in ((sums.d_key, found.d_key), (sums.d_value, found.d_value))
        )
        return Gradients(sums.d_query + found.d_query, d_key, d_value), None

    nothing = Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (query, key, value)))
    return jax.lax.scan(add_part, nothing, _distances())[0]


def _distances() -> Int[Array, " _"]:
    return jnp.arange(1, context.num_parts(), dtype=jnp.int32)


def _part(distance: Array) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The part so many before this one, counted around the row, and whether it is before it."""
    own = jax.lax.axis_index(CONTEXT_AXIS)
    return (own - distance) % context.num_parts(), distance <= own
