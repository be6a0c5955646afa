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

    It is removed if the block raises. What a killed process of this machine left is removed by the next one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{path.name}.partial-{socket.gethostname()}-"
    for leftover in path.parent.glob(f"{prefix}*"):
        pid = leftover.name.removeprefix(prefix)
        if pid.isdigit() and (int(pid) == os.getpid() or not _is_running(int(pid))):
            print(f"removing {leftover}, left by a run that was killed", file=sys.stderr)
            shutil.rmtree(leftover)
    partial = path.with_name(f"{prefix}{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if path.exists() and any(path.iterdir()):
            old = path.with_name(f"{path.name}.old-{os.getpid()}")
            os.rename(path, old)
            os.rename(partial, path)
            shutil.rmtree(old)
        else:
            os.rename(partial, path)  # onto nothing, or onto an empty folder
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user
        return True
    return True
