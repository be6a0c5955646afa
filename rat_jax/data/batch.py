"""What a step reads: rows of tokens, what to learn from them, and which document each token is of."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float32, Int32


class Batch(NamedTuple):
    """Rows of tokens and what to learn from them: NumPy arrays of this host's, or JAX arrays of all hosts' rows."""

    tokens: Int32[np.ndarray | Array, "B T"]
    targets: Int32[np.ndarray | Array, "B T"]  # the token after each one
    loss_weights: Float32[np.ndarray | Array, "B T"]
    """1; 0 where the input ends a document, for targets that do not count or are no part of an answer, on padding."""
    segment_ids: Int32[np.ndarray | Array, "B T"] | None
    """1, 2, ... per document of the row, 0 on padding; None: not asked for."""
