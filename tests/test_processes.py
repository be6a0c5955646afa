"""Which processes still run, and which of one number is which."""

import os
import subprocess
import sys

import pytest

from rat_jax.processes import is_running, start_time


def test_this_process_runs_and_later_ones_of_its_number_are_others():
    pid = os.getpid()
    assert is_running(pid)
    assert is_running(pid, start_time(pid))
    assert not is_running(pid, start_time(pid) + 1)


def test_a_process_that_has_ended_does_not_run_although_its_parent_has_not_asked():
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(process.pid)
    process.wait()
    assert not is_running(process.pid)


@pytest.mark.parametrize("pid", [2**22 + 1, 10**30])
def test_numbers_that_no_process_has(pid):
    assert not is_running(pid)
    assert start_time(pid) is None


def test_systems_that_say_less(monkeypatch):
    """A process of another user runs; where there is no /proc, one of the same number is taken for the same."""
    monkeypatch.setattr("pathlib.Path.read_text", lambda path, **options: "")
    assert is_running(os.getpid(), started=1)
    assert start_time(os.getpid()) is None

    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    assert is_running(os.getpid())
