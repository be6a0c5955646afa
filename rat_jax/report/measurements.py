"""What was measured of a run after its training: the JSON files of its workdir, told apart by what they hold.

evaluations   losses of contexts, as `rat_jax.evaluation.results.as_json` writes them
tasks         results of the lm-evaluation-harness, as `rat_jax.evaluation.results.tasks_as_json` writes them
scores        any other figures: {"title": TEXT, "rows": [{"name": ..., "metric": ..., "value": ...}, ...]}, a row with
              the fields of `Score`

A file may hold several of them, and has a `step`; the settings that its scores depend on are its `measured`.
"""

import dataclasses
import math
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

from rat_jax.data import DataError
from rat_jax.data.json_object import build, require
from rat_jax.files import ContentError, read_object, system_errors

HARNESS = "Tasks of the lm-evaluation-harness"
_OTHER_FILES = ("run.json", "owner.json")
_LARGEST = 2**53  # of counts and losses: beyond it are no figures, but damage

T = TypeVar("T")


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
class MeasuredLoss:
    """Figures of one context length, and what they are of."""

    step: int
    data_path: str
    data_hash: str
    figures: LossFigures
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

    losses: tuple[MeasuredLoss, ...]
    scores: tuple[ScoreFile, ...]
    remarks: tuple[str, ...]  # files that are damaged, or hold none of this


def read_measurements(folder: pathlib.Path) -> Measurements:
    """Reads all results of a workdir; a file that is damaged is left out, and said to be.

    Raises:
      FileError: if the system refuses to read one.
    """
    with system_errors(folder, "read"):
        files = sorted(path for path in folder.glob("*.json") if path.is_file() and path.name not in _OTHER_FILES)
    losses: list[MeasuredLoss] = []
    scores: list[ScoreFile] = []
    remarks: list[str] = []
    for file in files:
        try:
            values = read_object(file)
            found = [*_losses(values, file.name)], [*_scores(values, file.name)]
        except FileNotFoundError:  # removed since
            continue
        except ContentError as error:
            remarks.append(f"left out: {str(error).removeprefix(f'{folder}/')}")
            continue
        except DataError as error:
            remarks.append(f"left out: {error}")
            continue
        losses += found[0]
        scores += found[1]
        if not any(found):
            remarks.append(f"left out: {file.name} holds no evaluations, tasks or scores")
    return Measurements(tuple(losses), tuple(scores), tuple(remarks))


def _losses(values: dict[str, Any], name: str) -> Iterator[MeasuredLoss]:
    for evaluation in _list(values, "evaluations", name):
        figures = _build_known(LossFigures, evaluation, name)
        _check_figures(figures, name)
        buckets = tuple(_build_known(Bucket, bucket, name) for bucket in figures.loss_by_position)
        require(
            all(0 <= bucket.first <= bucket.last < _LARGEST for bucket in buckets), name, "positions are in no order"
        )
        require(all(abs(bucket.loss or 0) < _LARGEST for bucket in buckets), name, "a loss is none")
        data = [values.get("data_path"), values.get("data_hash")]
        require(all(isinstance(text, str) for text in data), name, "data_path and data_hash must be texts")
        yield MeasuredLoss(_step(values, name), *data, figures, buckets)


def _check_figures(figures: LossFigures, name: str) -> None:
    for field in ("context_length", "num_targets"):
        number = getattr(figures, field)
        require(1 <= number < _LARGEST, name, f"{field} is {number}")
    require(0 <= figures.loss < _LARGEST, name, f"loss is {figures.loss}")
    require(0 < figures.split_fraction <= 1, name, f"split_fraction is {figures.split_fraction}")
    bits = figures.bits_per_byte
    require(bits is None or 1 / _LARGEST < bits < _LARGEST, name, f"bits_per_byte is {bits}")


def _scores(values: dict[str, Any], name: str) -> Iterator[ScoreFile]:
    if "tasks" in values:
        tasks, remarks = _dict(values, "tasks", name), []
        scores = [score for task in tasks for score in _harness_scores(task, _dict(tasks, task, name), name, remarks)]
        yield ScoreFile(HARNESS, _step(values, name), _dict(values, "measured", name), tuple(scores), tuple(remarks))
    if "scores" in values:
        table = _dict(values, "scores", name)
        require(isinstance(table.get("title"), str), name, "scores have no title")
        scores = [build(Score, row, f"{name}, a row of scores") for row in _list(table, "rows", name)]
        yield ScoreFile(table["title"], _step(values, name), _dict(values, "measured", name), tuple(scores), ())


def _harness_scores(task: str, values: dict[str, Any], name: str, remarks: list[str]) -> Iterator[Score]:
    """Figures of a task, or of the tasks of a group, by the harness's names: `acc,none` and `acc_stderr,none`."""
    if "error" in values:
        remarks.append(f"{task} failed: {values['error']}")
        return
    if values.get("num_truncated"):
        remarks.append(f"{task}: {values['num_truncated']} contexts were too long and cut")
    results, better = _dict(values, "results", name), _dict(values, "higher_is_better", name)
    counts = _dict(values, "n-samples", name)
    for part in results:
        metrics = _dict(results, part, name)
        for key, value in metrics.items():
            label, _, filtered_by = key.partition(",")
            if not filtered_by or label.endswith("_stderr") or not _is_number(value):
                continue
            stderr = metrics.get(f"{label}_stderr,{filtered_by}")
            num = _dict(counts, part, name).get("effective")
            higher = _dict(better, part, name).get(label)
            yield Score(
                name=part,
                metric=label if filtered_by == "none" else f"{label} ({filtered_by})",
                value=value,
                stderr=stderr if _is_number(stderr) else None,
                num=num if type(num) is int else None,
                higher_is_better=higher if isinstance(higher, bool) else None,
            )


def _step(values: dict[str, Any], name: str) -> int:
    step = values.get("step")
    require(type(step) is int and 0 <= step < _LARGEST, name, "step must be a whole number")
    return step


def _dict(values: dict[str, Any], key: str, name: str) -> dict[str, Any]:
    """The object under a key, an empty one if there is none."""
    value = values.get(key)
    require(value is None or isinstance(value, dict), name, f"{key[:80]} must be an object")
    return value or {}


def _list(values: dict[str, Any], key: str, name: str) -> list[Any]:
    value = values.get(key)
    require(value is None or isinstance(value, list), name, f"{key} must be a list")
    return value or []


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # which no NaN is, and no huge int


def _build_known(cls: type[T], values: Any, name: str) -> T:
    """`build` of the fields that a class has; files may hold more."""
    fields = [field.name for field in dataclasses.fields(cls)]
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key in fields}
    return build(cls, values, name)
