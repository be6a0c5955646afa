"""The watch of processes over each other, of processes that are threads here and end by an entry in a list."""

import contextlib
import socket
import subprocess
import sys
import threading
import time

import pytest

from rat_jax.cluster import watch
from rat_jax.cluster.link import Link
from rat_jax.cluster.watch import Watch
from tests.commands import ROOT

SECS = 2.0  # after which a process counts as lost


class Job:
    """The watches of three processes, and what they ended with."""

    def __init__(self):
        pairs = {number: [Link(end) for end in socket.socketpair()] for number in (1, 2)}
        self.links = {0: {n: pair[0] for n, pair in pairs.items()}, **{n: {0: pair[1]} for n, pair in pairs.items()}}
        self.watches = {number: Watch(links, number, SECS) for number, links in self.links.items()}
        self.ends = {}  # what each said

    def all_say(self, *numbers, within=10.0):
        until = time.monotonic() + within
        while not set(numbers) <= set(self.ends):
            assert time.monotonic() < until, self.ends
            time.sleep(0.01)
        (text,) = {self.ends[number] for number in numbers}
        return text

    def close(self):
        for process in self.watches.values():
            process._stopped.set()
        for process in self.watches.values():
            process._thread.join()
            process._stack.close()


@pytest.fixture
def job(monkeypatch):
    def end(process, text):
        jobs[0].ends.setdefault(process._process_id, text)
        process._stopped.set()
        for link in jobs[0].links[process._process_id].values():
            link.close()

    monkeypatch.setattr(Watch, "_end", end)
    monkeypatch.setattr(watch, "_delay_aborts", contextlib.nullcontext)
    monkeypatch.setattr(watch, "_GRACE_SECS", 0.5)
    jobs = []
    jobs.append(Job())
    yield jobs[0]
    jobs[0].close()


def test_nobody_is_lost_where_all_live_and_all_end_together(job):
    for step in range(3):
        for process in job.watches.values():
            process.step = step
        time.sleep(SECS / 2)
    assert job.ends == {}
    start = time.monotonic()
    for number in (2, 1):
        job.watches[number]._tell_end(0, failed=False)
        job.watches[number]._leaving = True
    job.watches[0].leave(0)
    assert time.monotonic() - start < 5
    assert job.ends == {}


def test_a_process_that_dies_is_told_to_all_at_once(job):
    job.watches[2]._stopped.set()
    job.watches[2]._thread.join()
    start = time.monotonic()
    job.links[2][0].close()
    assert job.all_say(0, 1) == "process 2 is lost: its connection was closed"
    assert time.monotonic() - start < 5


def test_a_process_that_is_silent(job):
    job.watches[2]._stopped.set()
    assert job.all_say(0, 1).startswith("process 2 is lost: it gave no sign of life for 2 s")


def test_the_first_process_is_silent(job):
    job.watches[0]._stopped.set()
    assert job.all_say(1, 2).startswith("process 0 is lost: it gave no sign of life for 2 s")


@pytest.mark.parametrize("stuck", [0, 1])
def test_a_process_that_stays_at_a_step_while_others_wait(job, stuck):
    for number, process in job.watches.items():
        process.step = 7 if number == stuck else 8
    text = f"process {stuck} is lost: it is stuck after step 7 for 2 s, while others wait for it"
    assert job.all_say(0, 1, 2) == text


def test_a_process_that_compiles_is_not_stuck(job, monkeypatch):
    for process in job.watches.values():
        process.step = 8
    monkeypatch.setattr(watch, "_of_process", job.watches[1])
    watch.reached(7)
    with watch.busy():
        time.sleep(2 * SECS)
        assert job.ends == {}
    assert "process 1 is lost: it is stuck after step 7" in job.all_say(0, 1, 2)


@pytest.mark.parametrize("failed", [0, 1])
def test_one_that_fails_alone_ends_the_others_after_some_grace(job, failed):
    start = time.monotonic()
    job.watches[failed].leave(1)
    others = {0, 1, 2} - {failed}
    assert job.all_say(*others) == f"process {failed} has ended with code 1, see what it says"
    assert time.monotonic() - start < 8


def test_one_that_fails_for_want_of_another_ends_as_that_is_lost(job, monkeypatch):
    """Its main thread finds out before the watch sees that the connection was closed."""
    monkeypatch.setattr(watch, "_of_process", job.watches[1])
    monkeypatch.setattr(watch.os, "_exit", lambda code: None)
    job.watches[0]._stopped.set()
    job.watches[0]._thread.join()
    threading.Timer(0.3, job.links[0][1].close).start()
    watch.leave(1)
    assert job.ends[1] == "process 0 is lost: its connection was closed"


def test_where_all_find_the_same_fault_each_ends_by_itself(job):
    for number in (1, 2):
        job.watches[number]._leaving = True
        job.watches[number]._tell_end(2, failed=True)
    job.watches[0].leave(2)
    time.sleep(1.0)
    assert job.ends == {}


def test_an_abort_leaves_the_watch_time_to_end_the_process_in_its_own_words():
    """Another process: one that aborts at once has no such time."""
    program = (
        "import ctypes, os, threading; from rat_jax.cluster.watch import _delay_aborts\n"
        "threading.Timer(0.5, lambda: os._exit(76)).start()\n"
        "with _delay_aborts(): ctypes.CDLL(None).abort()"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 76
