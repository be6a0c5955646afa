"""What the tests of single tokens that continue a state share."""

import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.ops import platform
from rat_jax.segments import SegmentInfo, StreamState, from_segments


def going_on(rows: int = 3) -> SegmentInfo:
    """One token a row: in turn rows whose document goes on, rows whose next one begins, and padding."""
    end = from_segments(jnp.ones((rows, 5), jnp.int32), StreamState.empty(rows))[1]
    return from_segments(jnp.asarray([[(1, 2, 0)[row % 3]] for row in range(rows)]), end)[0]


def relative_errors(found, wanted) -> list[float]:
    """Norm of each error over norm of what is wanted."""
    pairs = zip(found, wanted, strict=True)
    return [np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b) for a, b in pairs]


def trace_for(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int] | None = (9, 0)) -> None:
    """Lets programs be traced for a platform; the capability is that of a GPU."""
    monkeypatch.setattr(platform, "expected_platform", lambda: name)
    monkeypatch.setattr(platform, "expected_capability", lambda: capability if name == "gpu" else None)
