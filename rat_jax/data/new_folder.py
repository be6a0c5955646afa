"""A folder that is either complete or not there."""

import contextlib
import os
import pathlib
import shutil
import socket
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def new_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder to write into, beside `path`; it becomes `path`, replacing what is there, when the block ends well.

    It is removed if the block raises, and `path` is then as it was. What a killed process of this machine left is
    removed, or put back in its place, by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clean_up(path)
    partial, old = (path.with_name(f"{_prefix(path, what)}{os.getpid()}") for what in ("partial", "old"))
    partial.mkdir()
    try:
        yield partial
        if path.exists() and any(path.iterdir()):
            os.rename(path, old)
            try:
                os.rename(partial, path)
            except BaseException:  # an interrupt as well: what was there goes back to its place
                os.rename(old, path)
                raise
            shutil.rmtree(old)
        else:
            os.rename(partial, path)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _prefix(path: pathlib.Path, what: str) -> str:
    return f"{path.name}.{what}-{socket.gethostname()}-"


def _clean_up(path: pathlib.Path) -> None:
    for leftover in _leftovers(path, "partial"):
        print(f"removing {leftover}, left by a run that was killed", file=sys.stderr)
        shutil.rmtree(leftover)
    for leftover in _leftovers(path, "old"):
        if path.exists() and any(path.iterdir()):
            print(f"removing {leftover}, which was replaced by a run that was killed", file=sys.stderr)
            shutil.rmtree(leftover)
        else:
            print(f"renaming {leftover} to {path}: a run was killed while it replaced it", file=sys.stderr)
            os.rename(leftover, path)


def _leftovers(path: pathlib.Path, what: str) -> list[pathlib.Path]:
    """What processes of this machine that run no more left beside `path`."""
    prefix = _prefix(path, what)
    numbers = {
        found: found.name.removeprefix(prefix) for found in path.parent.iterdir() if found.name.startswith(prefix)
    }
    return [
        found
        for found, number in numbers.items()
        if number.isdecimal() and (int(number) == os.getpid() or not _is_running(int(number)))
    ]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True
