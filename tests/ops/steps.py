"""What the tests of single tokens that continue a state share."""

import jax.numpy as jnp
import numpy as np

from rat_jax.segments import SegmentInfo, StreamState, from_segments


def going_on(rows: int = 3) -> SegmentInfo:
    """One token a row: in turn rows whose document goes on, rows whose next one begins, and padding."""
    end = from_segments(jnp.ones((rows, 5), jnp.int32), StreamState.empty(rows))[1]
    return from_segments(jnp.asarray([[(1, 2, 0)[row % 3]] for row in range(rows)]), end)[0]


def relative_errors(found, wanted) -> list[float]:
    """Norm of each error over norm of what is wanted."""
    pairs = zip(found, wanted, strict=True)
    return [np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs]
