"""What softmax attention is told about its tokens, and what it returns, whichever body runs."""

import dataclasses
from typing import NamedTuple

import jax

from rat_jax.shapes import Array, Float, Float32, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyInfo:
    """Where queries or keys stand: a document (0 sees nothing and is not seen) and an order within the row."""

    segment_ids: Int[Array, "B X"]
    token_index: Int[Array, "B X"]
    contiguous: bool = dataclasses.field(default=False, metadata={"static": True})
    """Known when tracing: every row is one document from its order 0 on, without padding."""


class AttentionOutput(NamedTuple):
    """What a query read, and how much there was to read."""

    out: Float[Array, "B T N H"]  # zero where a query sees no key
    log_sum_exp: Float32[Array, "B T N"]  # of the scaled scores; very negative where a query sees no key
