"""Files that are either complete or as they were, however the process that writes them ends; and reading JSON."""

import contextlib
import errno
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from rat_jax.errors import RatJaxError


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
        raise FileError(f"{error.filename or path} cannot be {action}: {explain(error)}") from error


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
    try:
        values = json.loads(content.decode())
    except RecursionError:
        raise ContentError(f"{path} is damaged: it is nested too deeply") from None
    except ValueError as error:  # of JSON, UTF-8, or numbers that are too long
        raise ContentError(f"{path} is damaged: {error}") from None
    if not isinstance(values, dict):
        raise ContentError(f"{path} is damaged: it holds no JSON object")
    return values


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
