"""Rows of ours from files of earlier comparisons, which need not be timed again."""

from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.printed_rows import Row
from benchmarks.rivals.table import key
from benchmarks.rivals.task import OURS, Task
from rat_jax.files import read_object
from rat_jax.program import FlagError


class Earlier(NamedTuple):
    """What a file of `--out` has of ours."""

    path: Path
    card: str  # device, day and versions
    rows: list[Row]  # those that have all of their times


def read(path: Path, task: Task) -> Earlier:
    """Rows of a file whose layers had the task's sizes.

    Raises:
      FlagError: if there is no such file, if `--out` has not written it, or if its sizes are others.
      ContentError, FileError: if it cannot be read.
    """
    try:
        values = read_object(path)
    except FileNotFoundError:
        raise FlagError(f"--ours names {path}, which does not exist") from None
    try:
        then = _sizes(Task(**values["task"]))
        rows = [row for row in values["rows"] if row["rival"] == OURS and "error" not in row]
        earlier, _ = Earlier(path, values["card"], rows), [key(row) for row in rows]
    except (KeyError, TypeError, ValueError):
        raise FlagError(f"--ours names {path}, which is no file that --out has written") from None
    for name, size in _sizes(task).items():
        if then[name] != size:
            sizes = f"{name} {then[name]}, not {size}"
            raise FlagError(f"--ours names {path}, whose rows have {sizes}; give the flags that it was made with")
    return earlier


def _sizes(task: Task) -> dict[str, Any]:
    """What must be the same in tasks whose rows stand in one table."""
    return {name: getattr(task, name) for name in ("width", "heads", "tokens", "repeats", "small", "keys_seen")}


def check_card(earlier: Earlier, card: str) -> None:
    """Refuses rows of another device, day or version.

    Raises:
      FlagError: if the descriptions differ.
    """
    if earlier.card != card:
        raise FlagError(
            f"--ours names {earlier.path}, measured on {earlier.card!r}; this is {card!r}: leave it out, so that ours "
            "are timed here"
        )


def lacking(task: Task, rows: list[Row]) -> Task:
    """The part of a task of ours of which some row is not there; its lengths stay, as windows depend on them."""
    found = {key(row) for row in rows}
    return task._replace(
        layers=tuple(name for name in task.layers if {(OURS, name, tokens) for tokens in task.lengths} - found),
        models=tuple(name for name in task.models if (OURS, name, 0) not in found),
    )
