"""What was measured of a run's checkpoints: losses of contexts, losses beyond the training length, scores of tasks."""

import dataclasses
import math
from typing import Any


@dataclasses.dataclass(frozen=True)
class Bucket:
    """The mean loss at neighbouring positions of a context."""

    first: int
    last: int
    loss: float | None  # nats a token

    @property
    def middle(self) -> float:
        """The geometric middle, counted from 1: its place on a logarithmic axis."""
        return math.sqrt((self.first + 1) * (self.last + 1))


@dataclasses.dataclass(frozen=True)
class LossFigures:
    """The loss of a validation split, or of a part of it, in contexts of one length."""

    context_length: int
    split_fraction: float
    num_targets: int
    loss: float  # nats a token
    bits_per_byte: float | None
    loss_by_position: list[Any]

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def nats_per_byte(self) -> float | None:
        return None if self.bits_per_byte is None else self.bits_per_byte * math.log(2)

    @property
    def num_bytes(self) -> int | None:
        """Bytes of the text that was predicted; None where they are not known, or only estimated."""
        if not self.bits_per_byte or self.split_fraction < 1:
            return None
        return round(self.loss * self.num_targets / (math.log(2) * self.bits_per_byte))


@dataclasses.dataclass(frozen=True)
class LengthFigures:
    """The loss of a validation split, or of a part of it, in contexts longer than those of the training."""

    trained_length: int
    context_length: int
    positions: str  # what they are counted from the start of: row or document
    split_fraction: float
    num_targets: int
    loss_within: float | None  # at positions below the training length
    loss_beyond: float | None  # at the others
    loss_by_position: list[Any]


@dataclasses.dataclass(frozen=True)
class MeasuredLoss:
    """Figures of one context length, and what they are of."""

    step: int
    data_path: str
    data_hash: str
    figures: LossFigures | LengthFigures
    buckets: tuple[Bucket, ...]


@dataclasses.dataclass(frozen=True)
class Score:
    """One figure of one task."""

    name: str  # of the task; a length or another condition is part of it
    metric: str
    value: float
    stderr: float | None = None
    num: int | None = None  # documents
    higher_is_better: bool | None = None


@dataclasses.dataclass(frozen=True)
class ScoreFile:
    """Scores that were measured together, under the same settings."""

    title: str
    step: int
    settings: dict[str, Any]
    scores: tuple[Score, ...]
    remarks: tuple[str, ...]  # tasks that failed, contexts that were cut


@dataclasses.dataclass(frozen=True)
class Measurements:
    """All that the files of a workdir hold."""

    losses: tuple[MeasuredLoss, ...]  # of `LossFigures`
    lengths: tuple[MeasuredLoss, ...]  # of `LengthFigures`
    scores: tuple[ScoreFile, ...]
    remarks: tuple[str, ...]  # files that are damaged, or hold none of this
