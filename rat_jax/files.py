"""Files that are either complete or as they were, however the process that writes them ends."""

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


_REMEDIES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room in your quota",
    errno.EROFS: "choose a place that can be written to",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.ENOTDIR: "a part of its path is a file: choose another place",
    errno.EISDIR: "it is a folder: name a file in it",
    errno.ELOOP: "a symbolic link points to itself: mend the link",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def explain(error: OSError) -> str:
    """Why the system refused, and what to do, in one line without the path."""
    reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
    remedy = _REMEDIES.get(error.errno)
    return reason if remedy is None else f"{reason}; {remedy}"


@contextlib.contextmanager
def system_errors(path: pathlib.Path | str, action: str) -> Iterator[None]:
    """Turns an `OSError` of the block into a `FileError`: "PATH cannot be ACTION: why; what to do"."""
    try:
        yield
    except FileError:
        raise
    except OSError as error:
        raise FileError(f"{error.filename or path} cannot be {action}: {explain(error)}") from error


def write_json(path: pathlib.Path, values: Any) -> None:
    """Writes a file of JSON; errors as of `write_text`. Numbers that JSON lacks (NaN, infinity) are refused."""
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
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
