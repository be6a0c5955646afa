"""Scores of the runs side by side, with their standard errors: a table for each title."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from rat_jax.data.json_object import is_digest
from rat_jax.report import amounts
from rat_jax.report.measurements import Score
from rat_jax.report.run import Run
from rat_jax.report.table import Cell, Head, Row, Table

_ERROR_RULE = (
    "After ± is the standard error. A score is bold where it is better than each other one by more than the standard "
    "error of their difference, √(a² + b²)."
)
# Settings that decide nothing beside what the page says of tokenizers.
_NOT_COMPARED = ("tokenizer_hash", "essay")  # of an essay its hash decides, not where it lies

_Key = tuple[str, str]  # task and metric


@dataclasses.dataclass
class _Column:
    """Scores of one checkpoint under the same settings."""

    run: int
    label: str
    step: int
    settings: dict[str, Any]
    scores: dict[_Key, Score]


def score_tables(runs: Sequence[Run]) -> list[Table]:
    """A table for each title that result files have."""
    titles = dict.fromkeys(file.title for run in runs for file in run.measurements.scores)
    return [_table(title, runs) for title in titles]


def _table(title: str, runs: Sequence[Run]) -> Table:
    columns, notes = _columns(title, runs)
    differing = _differing([column.settings for column in columns])
    rows = [
        Row(Head(name), tuple(Cell(_setting(column.settings, name)) for column in columns), kind="setting")
        for name in differing
    ]
    for key in dict.fromkeys(key for column in columns for key in column.scores):
        scores = [column.scores.get(key) for column in columns]
        best = None if differing else best_of(scores)
        digits = _digits(scores)
        cells = tuple(Cell(_text(score, digits), strong=index == best) for index, score in enumerate(scores))
        rows.append(Row(Head(key[0], detail=f"{key[1]}{_documents(scores)}"), cells))
    if len(columns) > 1:
        notes.insert(0, "The settings differ: no score is marked as the best." if differing else _ERROR_RULE)
    else:
        notes.insert(0, "After ± is the standard error.")
    same = [name for name in columns[0].settings if name not in differing]
    settings = "; ".join(f"{name} {_setting(columns[0].settings, name, whole=False)}" for name in same)
    if settings:
        notes.insert(0, f"Settings: {settings}.")
    heads = (Head("task"), *(Head(column.label, column.run, f"step {column.step:,}") for column in columns))
    return Table(title, heads, tuple(rows), tuple(notes))


def _columns(title: str, runs: Sequence[Run]) -> tuple[list[_Column], list[str]]:
    """A column for each run, step and settings, and what its files remark."""
    columns: dict[tuple[int, int, str], _Column] = {}
    notes = []
    for index, run in enumerate(runs):
        for file in run.measurements.scores:
            if file.title != title:
                continue
            settings = {name: value for name, value in file.settings.items() if name not in _NOT_COMPARED}
            key = (index, file.step, json.dumps(settings, sort_keys=True))
            column = columns.setdefault(key, _Column(index, run.label, file.step, settings, {}))
            column.scores |= {(score.name, score.metric): score for score in file.scores}
            notes += [f"{run.label}, step {file.step:,}: {remark}" for remark in file.remarks]
    return [columns[key] for key in sorted(columns)], notes


def _differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for values in settings for name in values)
    return [name for name in names if len({json.dumps(values.get(name), sort_keys=True) for values in settings}) > 1]


def _setting(settings: dict[str, Any], name: str, *, whole: bool = True) -> str:
    """A setting as text, of a group of them the names alone unless the `whole` is wanted."""
    if name not in settings:
        return amounts.ABSENT
    value = settings[name]
    if isinstance(value, dict) and not whole:
        return amounts.plain(list(value))
    return value[:8] if isinstance(value, str) and is_digest(value) else amounts.plain(value)


def best_of(scores: Sequence[Score | None]) -> int | None:
    """The index of the score that is better than each other by more than the standard error of the difference.

    None where there is none, a score, an error or a number of documents is not known, or these numbers differ.
    """
    known = [(index, score) for index, score in enumerate(scores) if score is not None]
    directions = {score.higher_is_better for _, score in known}
    if len(known) < 2 or len(directions) > 1 or None in directions:
        return None
    nums = {score.num for _, score in known}
    if len(nums) > 1 or None in nums:
        return None
    sign = 1.0 if directions == {True} else -1.0
    best, top = max(known, key=lambda member: sign * member[1].value)
    for index, score in known:
        if index == best:
            continue
        if top.stderr is None or score.stderr is None:
            return None
        if not sign * (top.value - score.value) > math.hypot(top.stderr, score.stderr):
            return None
    return best


def _text(score: Score | None, digits: int) -> str:
    if score is None:
        return amounts.ABSENT
    value = amounts.fixed(score.value, digits)
    return value if score.stderr is None else f"{value} ± {amounts.fixed(score.stderr, digits)}"


def _digits(scores: Sequence[Score | None]) -> int:
    """After the point: of shares of 1 and small numbers four, of percents and larger numbers two."""
    return 4 if all(abs(score.value) < 10 for score in scores if score is not None) else 2


def _documents(scores: Sequence[Score | None]) -> str:
    counts = list(dict.fromkeys(score.num for score in scores if score is not None and score.num is not None))
    return f", {' or '.join(map(amounts.count, counts))} documents" if counts else ""
