"""A folder that is either complete or not there."""

import contextlib
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Iterator

from rat_jax.data import DataError
from rat_jax.files import system_errors
from rat_jax.processes import is_running


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to write into, beside `path`; it becomes `path`, replacing what is there, when the block ends well.

    It is removed if the block raises. What a killed process of this machine left is removed by the next one, and what
    it had moved aside comes back. Where `path` is a symbolic link, all this happens where it points.

    Raises:
      DataError: if `path` was missing or empty at first and holds something at the end: another process was quicker.
      FileError: if the system refuses a step.
    """
    path = pathlib.Path(os.path.realpath(path))
    with system_errors(path, "made"):
        path.parent.mkdir(parents=True, exist_ok=True)
        _clean_up(path)
        partial = _beside(path, "partial", os.getpid())
        partial.mkdir()
        replaces = _holds_something(path)
    try:
        yield partial
        if _holds_something(path) and not replaces:
            raise DataError(f"{path} was made by another process in the meantime; it is left as it is")
        with system_errors(path, "made"):
            _sync(partial)
            _put(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _put(partial: pathlib.Path, path: pathlib.Path) -> None:
    if not _holds_something(path):
        os.rename(partial, path)  # onto nothing, or onto an empty folder
    else:
        old = _beside(path, "old", os.getpid())
        os.rename(path, old)
        try:
            os.rename(partial, path)
        except BaseException:
            os.rename(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)
    _sync_one(path.parent)


def _clean_up(path: pathlib.Path) -> None:
    """Removes what killed processes left, and brings back what one of them had moved aside for its new folder."""
    for kind in ("old", "partial"):
        prefix = _beside(path, kind, "").name
        for leftover in sorted(path.parent.iterdir()):
            pid = leftover.name.removeprefix(prefix)
            if not leftover.name.startswith(prefix) or not pid.isdecimal():
                continue
            if int(pid) != os.getpid() and is_running(int(pid)):
                continue
            if kind == "old" and not path.exists():
                print(f"{path} is back from {leftover}, where a run that was killed had moved it", file=sys.stderr)
                os.rename(leftover, path)
            else:
                print(f"removing {leftover}, left by a run that was killed", file=sys.stderr)
                shutil.rmtree(leftover)


def _beside(path: pathlib.Path, kind: str, pid: int | str) -> pathlib.Path:
    return path.with_name(f"{path.name}.{kind}-{socket.gethostname()}-{pid}")


def _holds_something(path: pathlib.Path) -> bool:
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


def _sync(folder: pathlib.Path) -> None:
    """Brings all to the disk before the folder gets its name, so that it is complete after a loss of power too."""
    for path in [*folder.rglob("*"), folder]:
        if not path.is_symlink():
            _sync_one(path)


def _sync_one(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
