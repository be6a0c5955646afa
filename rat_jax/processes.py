"""Processes of this machine and container: whether they still run."""

import os
import pathlib


def is_running(pid: int, started: int | None = None) -> bool:
    """Whether a process has not ended. One whose parent has yet to ask how it ended has ended.

    Args:
      pid: its number; one that the system cannot give is of no process.
      started: its `start_time`, which tells it from a later process of the same number; None: not known.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # of another user
        pass
    fields = _fields(pid)
    if fields is None:  # a system that does not say
        return True
    state, start = fields
    return state not in "ZX" and started in (None, start)


def start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since the machine did; None if the system does not say."""
    fields = _fields(pid)
    return None if fields is None else fields[1]


def _fields(pid: int) -> tuple[str, int] | None:
    """State and start time."""
    try:
        text = pathlib.Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    words = text.rpartition(")")[2].split()  # fields 3 and up; the name before may hold anything
    return (words[0], int(words[19])) if words else None
