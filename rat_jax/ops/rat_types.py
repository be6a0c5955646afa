"""What all implementations of the RAT mixing op share: results, and the state of a row."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from rat_jax.shapes import Array, Float, Float32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RatState:
    """What later tokens need to know of a row: the running pair and the summaries of all full chunks.

    A chunk that its document ended inside is never attended to, so that T tokens leave at most T // L summaries. Where
    they lie follows from where tokens are in their row and document: `SegmentInfo.first_slots` of period L.
    """

    key: Float32[Array, "B N H"]  # running k~, not rotated
    value: Float32[Array, "B N H"]  # running v~
    summary_key: Float[Array, "B S N H"]  # rotated by the chunk's position in its document
    summary_value: Float[Array, "B S N H"]

    @classmethod
    def empty(
        cls, batch_size: int, capacity: int, num_heads: int, head_dim: int, chunk_size: int, dtype: jnp.dtype
    ) -> "RatState":
        """The state before the first token, with room for `capacity` tokens a row."""
        chunks = max(1, capacity // chunk_size)
        running = jnp.zeros((batch_size, num_heads, head_dim), jnp.float32)
        summaries = jnp.zeros((batch_size, chunks, num_heads, head_dim), dtype)
        return cls(key=running, value=running, summary_key=summaries, summary_value=summaries)


class RatOutput(NamedTuple):
    """The mixed tokens and, where a state was given, the state after them."""

    out: Float[Array, "B T D"]
    state: RatState | None
