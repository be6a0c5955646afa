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
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from benchmarks.evidence.studies import KINDS
from rat_jax.errors import RatJaxError

_DRAWS, _PERCENTILES = 2000, (2.5, 97.5)

Verdict = Literal["lower", "tie", "higher"]


@dataclasses.dataclass(frozen=True)
class Result:
    """The models of one kind, one for each seed."""

    kind: str
    models: tuple[Mapping[str, Any], ...]  # as `measurement.measure` gives them

    @property
    def lengths(self) -> list[int]:
        """Tokens of sequences that losses are known of."""
        return sorted(map(int, self.models[0]["lengths"]))

    @property
    def parameters(self) -> int:
        """Of the model."""
        return self.models[0]["parameters"]

    def losses(self, length: int) -> np.ndarray:
        """Mean losses, one for each seed."""
        return np.array([model["lengths"][str(length)]["loss"] for model in self.models])

    def loss(self, length: int) -> float:
        """The mean over seeds, in nats a token."""
        return float(self.losses(length).mean())

    def by_document(self, length: int) -> np.ndarray:
        """Sums of losses of each document, the mean over seeds."""
        return np.mean([model["lengths"][str(length)]["document_losses"] for model in self.models], axis=0)

    def by_octave(self, length: int) -> list[tuple[int, float]]:
        """First positions and mean losses, the mean over seeds."""
        octaves = [model["lengths"][str(length)]["loss_by_octave"] for model in self.models]
        return [(int(rows[0][0]), float(np.mean([loss for _, loss in rows]))) for rows in zip(*octaves, strict=True)]

    def curve(self) -> list[tuple[float, float]]:
        """Tokens and validation losses while training, the mean over seeds."""
        curves = [model["validation_losses"] for model in self.models]
        steps = self.models[0]["config"]["training"]["num_steps"]
        tokens = self.models[0]["training_tokens"] / steps
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
        return np.array(next(iter(self.by_kind.values())).models[0]["document_targets"])

    @property
    def length(self) -> int:
        """Tokens of a sequence of the training."""
        return next(iter(self.by_kind.values())).models[0]["config"]["data"]["seq_len"]

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
      RatJaxError: if there is none, a file is no result, or they are of several validation splits.
    """
    found: dict[str, list[Mapping[str, Any]]] = {}
    failures = {}
    for kind, values in _read(folder / "results"):
        if "failed" in values:
            failures[f"{kind}-{values['seed']}"] = values["failed"]
        else:
            found.setdefault(kind, []).append(values)
    if not found:
        raise RatJaxError(f"{folder} has no results: python -m benchmarks.evidence.run_studies --out {folder}")
    splits = {tuple(model["document_targets"]) for models in found.values() for model in models}
    if len(splits) > 1:
        raise RatJaxError(f"the results of {folder} are of {len(splits)} validation splits, which do not compare")
    kinds: Sequence[str] = [kind for kind in KINDS if kind in found]
    speeds = {kind: values["tokens_per_second"] for kind, values in _read(folder / "speeds")}
    return Results({kind: Result(kind, tuple(found[kind])) for kind in kinds}, failures, speeds)


def _read(folder: pathlib.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for file in sorted(folder.glob("*.json")):
        try:
            values = json.loads(file.read_text())
            yield values["kind"], values
        except (ValueError, KeyError, TypeError) as error:
            raise RatJaxError(f"{file} is no result of a study: {error!r}") from None
