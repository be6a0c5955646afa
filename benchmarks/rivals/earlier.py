"""Rows of ours from files of earlier comparisons, which need not be timed again."""

from pathlib import Path
from typing import NamedTuple

from benchmarks.rivals.table import key
from benchmarks.rivals.task import OURS, Row, Task
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
        then = Task(**values["task"])
        rows = [row for row in values["rows"] if row["rival"] == OURS and "error" not in row]
        earlier, _ = Earlier(path, values["card"], rows), [key(row) for row in rows]
    except (KeyError, TypeError):
        raise FlagError(f"--ours names {path}, which is no file that --out has written") from None
    for name in ("width", "heads", "tokens", "small", "keys_seen"):
        if getattr(then, name) != getattr(task, name):
            sizes = f"{name} {getattr(then, name)}, not {getattr(task, name)}"
            raise FlagError(f"--ours names {path}, whose rows have {sizes}; give the flags that it was made with")
    return earlier


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
