"""How a caller sees batches go by."""

from collections.abc import Callable, Iterable
from typing import Any

Progress = Callable[[Iterable[Any], int], Iterable[Any]]  # wraps batches, of which the number is given


def no_progress(batches: Iterable[Any], num_batches: int) -> Iterable[Any]:
    """Shows nothing."""
    return batches
