"""The log of a run, `log.jsonl`: a record a line, only ever appended to, or cut back to the step a run resumes from.

A record is a JSON object with the number of a `step` and figures by name. JSON has no NaN and no infinity: such a
figure is null. Lines that are no records (blank, torn by a kill, overwritten by something else) are read over.
"""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from rat_jax.files import FileError, explain, system_errors, write_bytes

Record = dict[str, Any]
"""`step`, and a number or None for every figure."""

_LAST_STEP = 2**53  # beyond it, not every whole number is one of JSON's


class Line(NamedTuple):
    """A line of a log."""

    number: int  # from 1
    content: bytes  # without its end
    record: Record | None  # None: it holds none


class RunLog:
    """A log that is written."""

    def __init__(self, path: pathlib.Path, resume_step: int):
        """Opens it. Records of later steps than `resume_step`, which will be done again, are cut off, and lines that
        hold no record are moved to a file beside it.

        Raises:
          FileError: if the system refuses.
        """
        self._path = path
        lines = read_lines(path)
        kept = [line for line in lines if line.record is not None and line.record["step"] <= resume_step]
        self.records = [line.record for line in kept]
        self.bad_lines = [line.number for line in lines if line.record is None]
        if self.bad_lines:
            with system_errors(self.bad_file, "written"), self.bad_file.open("ab") as file:
                file.write(b"".join(line.content + b"\n" for line in lines if line.record is None))
        content = b"".join(line.content + b"\n" for line in kept)
        with system_errors(path, "written"):
            if not path.is_file() or path.read_bytes() != content:
                write_bytes(path, content)
            self._file = path.open("ab", buffering=0)

    @property
    def bad_file(self) -> pathlib.Path:
        """Where lines go that hold no record."""
        return self._path.with_name(self._path.name + ".bad")

    def append(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes a record.

        Raises:
          FileError: if the system refuses.
        """
        record = {"step": step} | {name: _number(value) for name, value in figures.items()}
        self.records.append(record)
        with system_errors(self._path, "written"):
            rest = json.dumps(record, allow_nan=False).encode() + b"\n"
            while rest:  # a disk that is full takes a part first, and refuses the rest
                rest = rest[self._file.write(rest) :]

    def close(self) -> None:
        self._file.close()


def read_log(path: pathlib.Path) -> list[Record]:
    """The records of a log, none if there is no such file. Figures that are no numbers are None.

    Raises:
      FileError: if the system refuses to read it.
    """
    return [line.record for line in read_lines(path) if line.record is not None]


def read_lines(path: pathlib.Path) -> list[Line]:
    """The lines of a log, those that hold no record too; errors as of `read_log`."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise FileError(f"{path} cannot be read: {explain(error)}") from error
    lines = content.removesuffix(b"\n").split(b"\n") if content else []
    return [Line(number, line, _record(line)) for number, line in enumerate(lines, start=1)]


def _record(line: bytes) -> Record | None:
    try:
        values = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    step = values.get("step") if isinstance(values, dict) else None
    if type(step) is not int or not 0 <= step <= _LAST_STEP:
        return None
    return values | {name: _number(value) for name, value in values.items() if name != "step"}


def _number(value: Any) -> float | int | None:
    """A figure as JSON can hold it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return value if math.isfinite(value) else None
    except OverflowError:  # a whole number beyond all floats
        return None
