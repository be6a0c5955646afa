"""The JSON files of a workdir that hold results, told apart by what they hold.

evaluations   losses of contexts, as `rat_jax.evaluation.results.as_json` writes them
loss_beyond   a loss by position beyond the training length
tasks         results of the lm-evaluation-harness, as `rat_jax.evaluation.results.tasks_as_json` writes them
results       a list of RULER's tasks at a context length, each with scores and standard errors
num_prompts   scores of answers to the prompts of a file
scores        any other figures: {"title": TEXT, "rows": [{"name": ..., "metric": ..., "value": ...}, ...]}, a row with
              the fields of `rat_jax.report.measurements.Score`

A file has a `step`; the settings that its scores depend on are its `measured`.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

from rat_jax.data import DataError
from rat_jax.data.json_object import LARGEST, build, build_known, require
from rat_jax.files import ContentError, read_object, system_errors
from rat_jax.report.measurements import (
    Bucket,
    LengthFigures,
    LossFigures,
    MeasuredLoss,
    Measurements,
    Score,
    ScoreFile,
)

HARNESS, RULER, ANSWERS = "Tasks of the lm-evaluation-harness", "RULER", "Answers to prompts"
_OTHER_FILES = ("run.json", "owner.json")


@dataclasses.dataclass(frozen=True)
class _RulerTask:
    """One entry of RULER's results."""

    task: str
    context_length: int
    num_examples: int | None = None
    scores: dict[str, Any] | None = None
    standard_errors: dict[str, Any] | None = None
    error: str | None = None  # why it has none


def read_measurements(folder: pathlib.Path) -> Measurements:
    """Reads all results of a workdir; a file that is damaged is left out, and said to be.

    Raises:
      FileError: if the system refuses to read one.
    """
    with system_errors(folder, "read"):
        files = sorted(path for path in folder.glob("*.json") if path.is_file() and path.name not in _OTHER_FILES)
    losses: list[MeasuredLoss] = []
    lengths: list[MeasuredLoss] = []
    scores: list[ScoreFile] = []
    remarks: list[str] = []
    for file in files:
        try:
            values = read_object(file)
            found = [*_losses(values, file.name)], [*_lengths(values, file.name)], [*_scores(values, file.name)]
        except FileNotFoundError:  # removed since
            continue
        except (ContentError, DataError) as error:
            remarks.append(f"left out: {str(error).removeprefix(f'{folder}/')}")
            continue
        for all_of_them, of_this_file in zip((losses, lengths, scores), found, strict=True):
            all_of_them.extend(of_this_file)
        if not any(found):
            remarks.append(f"left out: {file.name} holds no results that this page shows")
    return Measurements(tuple(losses), tuple(lengths), tuple(scores), tuple(remarks))


def _losses(values: dict[str, Any], name: str) -> Iterator[MeasuredLoss]:
    for evaluation in _list(values, "evaluations", name):
        figures = build_known(LossFigures, evaluation, name)
        bits = figures.bits_per_byte
        require(bits is None or 1 / LARGEST < bits < LARGEST, name, f"bits_per_byte is {bits}")
        require(0 <= figures.loss < LARGEST, name, f"loss is {figures.loss}")
        yield _measured_loss(values, figures, name)


def _lengths(values: dict[str, Any], name: str) -> Iterator[MeasuredLoss]:
    if "loss_beyond" in values:
        figures = build_known(LengthFigures, values, name)
        require(1 <= figures.trained_length < LARGEST, name, f"trained_length is {figures.trained_length}")
        for loss in (figures.loss_within, figures.loss_beyond):
            require(loss is None or 0 <= loss < LARGEST, name, f"a loss is {loss}")
        yield _measured_loss(values, figures, name)


def _measured_loss(values: dict[str, Any], figures: LossFigures | LengthFigures, name: str) -> MeasuredLoss:
    """Checks what both kinds of figures have in common."""
    for field in ("context_length", "num_targets"):
        number = getattr(figures, field)
        require(1 <= number < LARGEST, name, f"{field} is {number}")
    require(0 < figures.split_fraction <= 1, name, f"split_fraction is {figures.split_fraction}")
    buckets = tuple(build_known(Bucket, bucket, name) for bucket in figures.loss_by_position)
    for bucket in buckets:
        require(0 <= bucket.first <= bucket.last < LARGEST, name, f"positions {bucket.first} .. {bucket.last} are none")
        require(abs(bucket.loss or 0) < LARGEST, name, f"loss at position {bucket.first} is {bucket.loss}")
    data = [values.get("data_path"), values.get("data_hash")]
    require(all(isinstance(text, str) for text in data), name, "data_path and data_hash must be texts")
    return MeasuredLoss(_step(values, name), *data, figures, buckets)


def _scores(values: dict[str, Any], name: str) -> Iterator[ScoreFile]:
    settings, remarks = _dict(values, "measured", name), []
    if "tasks" in values:
        yield from _harness_files(values, settings, name)
    elif "results" in values:
        settings = {key: value for key, value in settings.items() if key != "context_lengths"}  # each row has its own
        scores = _ruler_scores(_list(values, "results", name), name, remarks)
        yield ScoreFile(RULER, _step(values, name), settings, tuple(scores), tuple(remarks))
    elif "num_prompts" in values:
        scores = _answer_scores(values, str(settings.pop("file", "")), name)
        yield ScoreFile(ANSWERS, _step(values, name), settings, tuple(scores), ())
    elif "scores" in values:
        table = _dict(values, "scores", name)
        require(isinstance(table.get("title"), str), name, "scores have no title")
        scores = [build(Score, row, f"{name}, a row of scores") for row in _list(table, "rows", name)]
        yield ScoreFile(table["title"], _step(values, name), settings, tuple(scores), ())


def _harness_files(values: dict[str, Any], settings: dict[str, Any], name: str) -> Iterator[ScoreFile]:
    """The scores of each group that papers report, and those of other tasks, by the settings they were read with."""
    tasks, groups = _dict(values, "tasks", name), _dict(settings, "groups", name)
    group_of = {task: group for group in groups for task in _dict(_dict(groups, group, name), "metrics", name)}
    shared = {key: value for key, value in settings.items() if key != "groups"}
    found: dict[tuple[str, str], ScoreFile] = {}
    for task in tasks:
        entry, group, remarks = _dict(tasks, task, name), group_of.get(task), []
        own = _dict(entry, "settings", name)
        if group is not None and shared.get("num_fewshot") is None:
            own = own | {"num_fewshot": groups[group].get("num_fewshot")}
        title = HARNESS if group is None else f"{HARNESS}: {group}"
        scores = tuple(_harness_scores(task, entry, name, remarks))
        key = title, json.dumps(own, sort_keys=True)
        before = found.get(key, ScoreFile(title, _step(values, name), shared | own, (), ()))
        scores, remarks = (*before.scores, *scores), (*before.remarks, *remarks)
        found[key] = dataclasses.replace(before, scores=scores, remarks=remarks)
    means = _dict(values, "group_means", name)
    for (title, _), file in found.items():
        mean = means.get(title.removeprefix(f"{HARNESS}: "))
        if _is_number(mean):
            what = Score(name="mean of the group", metric="of each task's own", value=mean, higher_is_better=True)
            file = dataclasses.replace(file, scores=(*file.scores, what))
        yield file


def _harness_scores(task: str, values: dict[str, Any], name: str, remarks: list[str]) -> Iterator[Score]:
    """Figures of a task, or of the tasks of a group, by the harness's names: `acc,none` and `acc_stderr,none`."""
    if "error" in values:
        remarks.append(f"{task} failed: {values['error']}")
        return
    if values.get("num_truncated"):
        remarks.append(f"{task}: {values['num_truncated']} contexts were too long and cut")
    if values.get("num_left_out"):
        remarks.append(f"{task}: {values['num_left_out']} documents are left out, as its protocol does")
    if without := _list(values, "without_examples", name):
        remarks.append(f"{', '.join(map(str, without))}: no examples before the questions, as the task's file says")
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


def _ruler_scores(results: list[Any], name: str, remarks: list[str]) -> list[Score]:
    """Scores in percent, by task and then by context length."""
    found: dict[str, list[tuple[int, Score]]] = {}
    for result in results:
        task = build_known(_RulerTask, result, f"{name}, a result")
        label = f"{task.task}, {task.context_length:,} tokens"
        if task.error is not None:
            remarks.append(f"{label} failed: {task.error}")
            continue
        for metric, value in (task.scores or {}).items():
            stderr = (task.standard_errors or {}).get(metric)
            row = {"name": label, "metric": f"{metric}, %", "value": value, "stderr": stderr, "num": task.num_examples}
            score = build(Score, row | {"higher_is_better": True}, f"{name}, {label}")
            found.setdefault(task.task, []).append((task.context_length, score))
    return [score for rows in found.values() for _, score in sorted(rows, key=lambda row: row[0])]


def _answer_scores(values: dict[str, Any], file: str, name: str) -> list[Score]:
    """Scores in percent; their errors are not known."""
    row = {"name": pathlib.PurePath(file).name, "num": values["num_prompts"], "higher_is_better": True}
    scores = _dict(values, "scores", name)
    return [build(Score, row | {"metric": f"{metric}, %", "value": scores[metric]}, name) for metric in scores]


def _step(values: dict[str, Any], name: str) -> int:
    step = values.get("step")
    require(type(step) is int and 0 <= step < LARGEST, name, "step must be a whole number")
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
