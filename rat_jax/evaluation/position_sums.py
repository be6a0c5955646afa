"""Sums of losses by position, and the means over ranges of positions."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from rat_jax.evaluation.errors import EvaluationError
from rat_jax.shapes import Array, Float32

FIRST_BUCKET = 16  # positions: no octave below it is a bucket of its own


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The mean loss at neighbouring positions."""

    first: int
    last: int
    num_targets: float
    loss: float | None  # nats a token; None where no target counts

    @property
    def middle(self) -> float:
        """The geometric middle, counted from 1: where a logarithmic axis shows the bucket."""
        return math.sqrt((self.first + 1) * (self.last + 1))


class PositionSums(NamedTuple):
    """Sums over tokens, one for each position or range of neighbouring positions."""

    loss: Float32[Array, " _"] | np.ndarray  # of weight * -log p(target), in nats
    weight: Float32[Array, " _"] | np.ndarray

    @property
    def num_targets(self) -> int:
        """Tokens that were predicted."""
        return round(float(self.weight.sum()))

    def mean(self, first: int = 0, end: int | None = None) -> float | None:
        """Loss in nats a token over sums `first` .. `end` - 1; None where no target counts."""
        loss, weight = (float(x[first:end].sum()) for x in self)
        return loss / weight if weight > 0 else None

    def buckets(self, starts: Sequence[int], edges: Sequence[int]) -> list[Bucket]:
        """Means over ranges of positions.

        Args:
          starts: the first position of each sum, and the position after the last one.
          edges: the first positions of the buckets, and the position after the last one: some of `starts`.
        """
        places = [starts.index(edge) for edge in edges]
        return [
            Bucket(starts[first], starts[end] - 1, float(self.weight[first:end].sum()), self.mean(first, end))
            for first, end in itertools.pairwise(places)
        ]


def add(total: PositionSums | None, more: PositionSums | None) -> PositionSums | None:
    """Both together in float64; None: nothing yet."""
    if more is None:
        return total
    more = PositionSums(*(np.asarray(x, np.float64) for x in more))
    return more if total is None else PositionSums(*map(np.add, total, more))


def require_result(total: PositionSums | None, position: Callable[[int], str], dtype: str) -> PositionSums:
    """The sums over all batches.

    Args:
      total: None: there was no batch.
      position: of a sum by its index, in words.
      dtype: of the model.

    Raises:
      EvaluationError: if nothing counts, or a loss is not finite.
    """
    if total is None or total.weight.sum() == 0:
        raise EvaluationError("no token of the validation split counts: it holds nothing but ends of documents")
    is_finite = np.isfinite(total.loss)
    if not is_finite.all():
        raise EvaluationError(
            f"the loss at position {position(int(np.argmin(is_finite)))} is not finite: the model's parameters are "
            f"damaged, or too large for {dtype}"
        )
    return total
