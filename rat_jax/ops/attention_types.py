"""What softmax attention is told about its tokens, and what it returns, whichever implementation runs."""

import dataclasses
from typing import NamedTuple

import jax

from rat_jax.segments import SegmentInfo
from rat_jax.shapes import Array, Float, Float32, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyInfo:
    """Of queries or keys: their document (0 sees nothing and is not seen) and their index within the row."""

    segment_ids: Int[Array, "B _"]  # T of queries, S of keys
    token_index: Int[Array, "B _"]
    contiguous: bool = dataclasses.field(default=False, metadata={"static": True})
    """Static: each row is one unpadded document from token 0; enables the fast paths."""

    @classmethod
    def of(cls, segments: SegmentInfo) -> "KeyInfo":
        """Of the tokens of a call."""
        return cls(segments.segment_ids, segments.token_index, segments.contiguous)


class AttentionOutput(NamedTuple):
    """What a query read, and how much there was to read."""

    out: Float[Array, "B T N H"]  # zero where a query sees no key
    log_sum_exp: Float32[Array, "B T N"]  # of the scaled scores; very negative where a query sees no key
