"""Files that are either complete or as they were, however the process that writes them ends; and reading JSON."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

from rat_jax.errors import RatJaxError, shown


class FileError(RatJaxError, OSError):
    """The system refuses a file; the message names it, says why and what to do."""


class ContentError(RatJaxError, ValueError):
    """A file that can be read but holds something else than it should; the message names it."""


_REMEDIES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room in your quota",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f), or choose another file system",
    errno.EEXIST: "a file, or a link to nothing, is there: remove it, or choose another place",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.ENOTDIR: "a part of its path is a file: choose another place",
    errno.EISDIR: "it is a folder: name a file in it",
    errno.ELOOP: "a symbolic link points to itself: mend the link",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def explain(error: Exception) -> str:
    """Why the system refused, and what to do, in one line without the path.

    Of an error that is none of the system's own but repeats the system's words somewhere in its text, as those of
    libraries do, these words are taken.
    """
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None)
    if reason is None:
        text = " ".join(str(error).split())
        number = next((number for number in _REMEDIES if os.strerror(number) in text), None)
        reason = text[:300] or type(error).__name__ if number is None else os.strerror(number)
    remedy = _REMEDIES.get(number)
    return reason if remedy is None else f"{reason}; {remedy}"


def in_words(error: RatJaxError | OSError) -> str:
    """The message of an error that a user can mend; of the system's own with the file and what to do."""
    if isinstance(error, RatJaxError):
        return str(error)
    return f"{error.filename or 'the system'}: {explain(error)}"


@contextlib.contextmanager
def system_errors(path: pathlib.Path | str, action: str) -> Iterator[None]:
    """Turns an `OSError` of the block into a `FileError`: "PATH cannot be ACTION: why; what to do"."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{error.filename2 or error.filename or path} cannot be {action}: {explain(error)}") from error


def read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object that a file holds.

    Raises:
      FileNotFoundError: if there is no such file.
      FileError: if the system refuses otherwise.
      ContentError: if it holds anything else.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(f"{path} cannot be read: {explain(error)}") from error
    return parse_object(content, str(path))


def parse_object(content: bytes, name: str) -> dict[str, Any]:
    """The JSON object of a UTF-8 text.

    Args:
      content: the text.
      name: of what holds it, for the message: "the header of train.bin".

    Raises:
      ContentError: if it is anything else.
    """
    try:
        values = json.loads(content.decode())
    except RecursionError:
        raise ContentError(f"{name} is damaged: it is nested too deeply") from None
    except ValueError as error:  # no UTF-8, no JSON, a number of too many digits
        raise ContentError(f"{name} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ContentError(f"{name} is damaged: expected a JSON object, got {shown(values)}")
    return values


def write_lines(path: pathlib.Path, lines: Iterable[str]) -> int:
    """Writes a file of lines one by one, whole or not at all; returns their number.

    Args:
      path: its folder is made where it is missing.
      lines: without their ends; errors of making them pass through.

    Raises:
      FileError: if the system refuses.
    """
    partial, count = path.with_name(f"{path.name}.partial"), 0
    with system_errors(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("w", encoding="utf-8") as file:
                for line in lines:
                    file.write(f"{line}\n")
                    count += 1
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            with contextlib.suppress(OSError):  # the first error is the one to report
                partial.unlink(missing_ok=True)
    return count


def check_new_file(path: pathlib.Path) -> None:
    """Refuses to write over anything, before the work.

    Raises:
      FileError: if something is there.
    """
    if os.path.lexists(path):
        raise FileError(f"{path} is there already; it is left as it is: remove it, or choose another name")


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a file of JSON; errors as of `write_bytes`. Numbers that JSON lacks (NaN, infinity) are refused."""
    write_text(path, json.dumps(values, indent=2, allow_nan=False) + "\n")


def write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file; errors as of `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: pathlib.Path, content: bytes) -> None:
    """Writes a file.

    Raises:
      FileError: if the system refuses; what was at `path` is then as it was.
    """
    partial = path.with_name(path.name + ".partial")
    with system_errors(path, "written"):
        try:
            with partial.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one to report
                partial.unlink(missing_ok=True)
            raise
