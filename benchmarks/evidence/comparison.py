"""What the losses of several kinds of models say, with their errors.

Two errors are told apart. That of training again with another seed is pooled: with losses l_ki of seeds i of kinds k
and their means m_k,

  s^2 = sum_ki (l_ki - m_k)^2 / sum_k (n_k - 1),

so that the mean of n seeds has a standard error of s / sqrt(n), and the difference of two kinds one of
s sqrt(1 / n_a + 1 / n_b). That of the text is a 95 % interval by document: the validation split's documents are drawn
with replacement 2,000 times (percentile bootstrap); in a difference both kinds have the same documents.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from benchmarks.evidence.result_files import Failure, ModelResult, read_result, read_speed, result_file
from benchmarks.evidence.studies import KINDS, Model
from rat_jax.errors import RatJaxError

_DRAWS, _PERCENTILES = 2000, (2.5, 97.5)

Verdict = Literal["lower", "tie", "higher"]


@dataclasses.dataclass(frozen=True)
class Result:
    """The models of one kind, one for each seed."""

    kind: str
    models: tuple[ModelResult, ...]

    @property
    def lengths(self) -> list[int]:
        """Tokens of sequences that losses are known of."""
        return sorted(self.models[0].lengths)

    @property
    def parameters(self) -> int:
        """Of the model."""
        return self.models[0].parameters

    def losses(self, length: int) -> np.ndarray:
        """Mean losses, one for each seed."""
        return np.array([model.lengths[length].loss for model in self.models])

    def loss(self, length: int) -> float:
        """The mean over seeds, in nats a token."""
        return float(self.losses(length).mean())

    def by_document(self, length: int) -> np.ndarray:
        """Sums of losses of each document, the mean over seeds."""
        return np.mean([model.lengths[length].document_losses for model in self.models], axis=0)

    def by_octave(self, length: int) -> list[tuple[int, float]]:
        """First positions and mean losses, the mean over seeds."""
        octaves = [model.lengths[length].loss_by_octave for model in self.models]
        return [(int(rows[0][0]), float(np.mean([loss for _, loss in rows]))) for rows in zip(*octaves, strict=True)]

    def curve(self) -> list[tuple[float, float]]:
        """Tokens and validation losses while training, the mean over seeds."""
        curves = [model.validation_losses for model in self.models]
        tokens = self.models[0].training_tokens / self.models[0].num_steps
        return [(rows[0][0] * tokens, float(np.mean([loss for _, loss in rows]))) for rows in zip(*curves, strict=True)]


@dataclasses.dataclass(frozen=True)
class Results:
    """All kinds that were measured, on one validation split."""

    by_kind: Mapping[str, Result]
    failures: Mapping[str, str]  # by model, what it said
    speeds: Mapping[str, float]  # tokens a second in training, of the kinds that were timed

    @functools.cached_property
    def targets(self) -> np.ndarray:
        """Targets of each document."""
        return np.array(next(iter(self.by_kind.values())).models[0].document_targets)

    @property
    def length(self) -> int:
        """Tokens of a sequence of the training."""
        return next(iter(self.by_kind.values())).models[0].seq_len

    @functools.cached_property
    def seed_deviation(self) -> float | None:
        """s, in nats a token at the training length; None: no kind has two seeds."""
        several = [result.losses(self.length) for result in self.by_kind.values() if len(result.models) > 1]
        freedom = sum(losses.size - 1 for losses in several)
        if not freedom:
            return None
        return math.sqrt(sum(float(((losses - losses.mean()) ** 2).sum()) for losses in several) / freedom)

    def error(self, *kinds: str) -> float | None:
        """The standard error of seeds of a kind's mean loss, or of the difference of two."""
        if self.seed_deviation is None:
            return None
        return self.seed_deviation * math.sqrt(sum(1 / len(self.by_kind[kind].models) for kind in kinds))

    def difference(self, kind: str, other: str) -> float:
        """Of a kind's loss less another's, at the training length."""
        return self.by_kind[kind].loss(self.length) - self.by_kind[other].loss(self.length)

    def verdict(self, kind: str, other: str) -> Verdict | None:
        """Whether a kind's loss is lower or higher than another's by more than two standard errors of seeds."""
        error = self.error(kind, other)
        if error is None:
            return None
        difference = self.difference(kind, other)
        return "tie" if abs(difference) <= 2 * error else "lower" if difference < 0 else "higher"

    def interval(self, kind: str, length: int) -> tuple[float, float]:
        """Of the text: where the loss lies on other documents."""
        return self._interval(self.by_kind[kind].by_document(length))

    def difference_interval(self, kind: str, other: str, length: int) -> tuple[float, float]:
        """Of the text: of a kind's loss less another's."""
        return self._interval(self.by_kind[kind].by_document(length) - self.by_kind[other].by_document(length))

    def growth_interval(self, kind: str, length: int) -> tuple[float, float]:
        """Of the text: of a kind's loss at a length less that at the training length."""
        result = self.by_kind[kind]
        return self._interval(result.by_document(length) - result.by_document(self.length))

    def _interval(self, sums: np.ndarray) -> tuple[float, float]:
        means = self._draws @ sums / (self._draws @ self.targets)
        low, high = np.percentile(means, _PERCENTILES)
        return float(low), float(high)

    @functools.cached_property
    def _draws(self) -> np.ndarray:
        """How often each document was drawn, in each of the draws."""
        count = self.targets.size
        return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_DRAWS).astype(np.float64)


def read_results(folder: pathlib.Path) -> Results:
    """The results of a folder that `run_studies.py` wrote, and `run_speeds.py`.

    Raises:
      RatJaxError: if there is none, a file is damaged or lacks a figure, or they do not compare.
    """
    found: dict[str, list[ModelResult]] = {}
    failures = {}
    for result in map(read_result, sorted((folder / "results").glob("*.json"))):
        if isinstance(result, Failure):
            failures[Model(result.kind, result.seed).name] = result.failed
        else:
            found.setdefault(result.kind, []).append(result)
    if not found:
        raise RatJaxError(f"{folder} has no results: python -m benchmarks.evidence.run_studies --out {folder}")
    _check_alike(folder, [model for models in found.values() for model in models], _OF_ALL)
    for models in found.values():
        _check_alike(folder, models, _OF_A_KIND)
    kinds: Sequence[str] = [kind for kind in KINDS if kind in found]
    speeds = {
        speed.kind: speed.tokens_per_second for speed in map(read_speed, sorted((folder / "speeds").glob("*.json")))
    }
    return Results({kind: Result(kind, tuple(found[kind])) for kind in kinds}, failures, speeds)


# What must be the same in results that are compared, or of which there is a mean.
_OF_ALL: dict[str, Callable[[ModelResult], Any]] = {
    "validation splits": lambda model: model.document_targets,
    "training lengths": lambda model: model.seq_len,
    "training steps": lambda model: model.num_steps,
    "training tokens": lambda model: model.training_tokens,
    "lengths of sequences": lambda model: sorted(model.lengths),
}
_OF_A_KIND: dict[str, Callable[[ModelResult], Any]] = {
    "octaves of positions": lambda model: {
        tokens: [first for first, _ in losses.loss_by_octave] for tokens, losses in model.lengths.items()
    },
    "steps of validations": lambda model: [step for step, _ in model.validation_losses],
}


def _check_alike(
    folder: pathlib.Path, models: Sequence[ModelResult], wanted: Mapping[str, Callable[[ModelResult], Any]]
) -> None:
    first, *others = models
    for what, of in wanted.items():
        for other in others:
            if of(other) != of(first):
                names = " and ".join(str(result_file(folder, Model(x.kind, x.seed))) for x in (first, other))
                raise RatJaxError(f"{names} are of different {what}, which do not compare: keep one of them elsewhere")
