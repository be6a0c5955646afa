"""What the backward pass of a part of a row is told of attention to summaries of other parts."""

from typing import NamedTuple

import jax


class Beyond(NamedTuple):
    """Gradients beside those of the call's own attention, whose log-sum-exp and output are those of all parts."""

    d_summary_keys: jax.Array  # float32 [B, C, N, H], through what the tokens of other parts read of the call's own
    d_summary_values: jax.Array  # float32 [B, C, N, H]
    d_scores: jax.Array  # float32 [B, N, T], summed over the summaries of other parts, of scores in natural units
