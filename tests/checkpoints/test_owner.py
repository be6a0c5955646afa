"""One owner of a folder: who holds it, who is gone, and what is left behind."""

import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from rat_jax.checkpoints import owner as owner_module
from rat_jax.checkpoints.owner import HeldError, Holder, owned
from rat_jax.checkpoints.workdir import OWNER_FILE, CheckpointError
from rat_jax.errors import RunStopped
from rat_jax.files import FileError
from rat_jax.program import exit_code

ROOT = pathlib.Path(__file__).parents[2]
HOLD = """
import pathlib, sys, time
from rat_jax.checkpoints.owner import owned
with owned(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def left_by(folder, **changes):
    """A folder that still has the file of another process, like this one but for the changes."""
    holder = dataclasses.replace(Holder.here(folder, locks=True), **changes)
    (folder / OWNER_FILE).write_text(json.dumps(dataclasses.asdict(holder)))
    return (folder / OWNER_FILE).read_bytes()


def assert_held(folder):
    before = (folder / OWNER_FILE).read_bytes()
    message = rf"is in use by process \d+ of .* on .*, since 20.*remove {folder}/owner.json"
    with pytest.raises(HeldError, match=message), owned(folder):
        pass
    assert names(folder) == [OWNER_FILE]
    assert (folder / OWNER_FILE).read_bytes() == before


def assert_taken(folder):
    with owned(folder) as owner:
        owner.check()
        assert Holder.read(folder / OWNER_FILE).pid == os.getpid()
        assert names(folder) == [OWNER_FILE]
    assert names(folder) == []


@pytest.fixture
def ids_are_told(monkeypatch):
    """Sandboxes hide what names a machine and its start."""
    text = owner_module._text
    monkeypatch.setattr(owner_module, "_text", lambda path: text(path) or f"what {path} would tell")


def test_a_second_owner_is_refused_and_changes_nothing(tmp_path, capsys):
    with owned(tmp_path) as owner:
        assert_held(tmp_path)
        owner.check()

        def second():
            with owned(tmp_path):
                raise AssertionError

        assert exit_code(second) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {tmp_path} is in use by process {os.getpid()} of ")
    assert_taken(tmp_path)


def test_a_process_that_sleeps_holds_it_and_one_that_was_killed_does_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    assert Holder.read(tmp_path / OWNER_FILE).pid == process.pid
    assert_held(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # ended, but its parent has not asked yet
    assert_taken(tmp_path)
    process.wait()
    process.stdout.close()


@pytest.mark.usefixtures("ids_are_told")
@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 2**22 + 1},  # beyond what Linux gives
        {"pid": 10**30},  # beyond what it can ask about
        {"started": 1},  # the number was given to this process since
        {"boot": "before the last start of the machine"},
        {"container": "pid:[1]"},  # ended, as its lock is gone
        {"container": "pid:[1]", "host": "other-name-of-this-machine"},
    ],
    ids=str,
)
def test_who_is_gone(tmp_path, changes):
    left_by(tmp_path, **changes)
    assert_taken(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"host": "elsewhere", "boot": "another"},
        {"machine": "another", "boot": "another"},
        {"host": "elsewhere", "boot": None},
        {"boot": None},
        {"container": "pid:[1]", "locks": False},
        {"container": "pid:[1]", "device": -1},  # another mount, whose locks are its own
    ],
    ids=str,
)
def test_who_may_live(tmp_path, changes):
    left_by(tmp_path, **changes)
    assert_held(tmp_path)
    silent_since(tmp_path, secs=300)
    assert_held(tmp_path)


@pytest.mark.parametrize(
    "changes", [{"host": "elsewhere", "boot": "another"}, {"boot": None}, {"container": "pid:[1]", "locks": False}]
)
def test_an_owner_that_cannot_be_seen_and_gives_no_sign_of_life_is_gone(tmp_path, changes):
    left_by(tmp_path, **changes)
    silent_since(tmp_path, secs=700)
    assert_taken(tmp_path)


def test_an_owner_gives_signs_of_life_and_is_seen_without_them(tmp_path, monkeypatch):
    monkeypatch.setattr("rat_jax.checkpoints.owner._BEAT_SECS", 0.01)
    with owned(tmp_path):
        silent_since(tmp_path, secs=700)
        while (tmp_path / OWNER_FILE).stat().st_mtime < time.time() - 600:
            time.sleep(0.01)
    monkeypatch.setattr("rat_jax.checkpoints.owner._BEAT_SECS", 600)
    with owned(tmp_path):
        silent_since(tmp_path, secs=700)  # it sleeps, and is in the list of processes
        assert_held(tmp_path)


def silent_since(folder, secs):
    then = time.time() - secs
    os.utime(folder / OWNER_FILE, (then, then))


def refuse(number):
    def call(*arguments, **settings):
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_file_systems_without_advisory_locks(tmp_path, monkeypatch, number):
    monkeypatch.setattr(fcntl, "flock", refuse(number))
    with owned(tmp_path):
        assert not Holder.read(tmp_path / OWNER_FILE).locks
        assert_held(tmp_path)
    left_by(tmp_path, pid=2**22 + 1)
    assert_taken(tmp_path)
    left_by(tmp_path, container="pid:[1]")
    assert_held(tmp_path)


def test_file_systems_without_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refuse(errno.EPERM))
    with owned(tmp_path) as owner:
        owner.check()
        assert_held(tmp_path)
    assert_taken(tmp_path)


def test_file_servers_whose_answer_is_lost(tmp_path, monkeypatch):
    link = os.link

    def link_and_complain(*paths):
        link(*paths)
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))

    monkeypatch.setattr(os, "link", link_and_complain)
    assert_taken(tmp_path)


def test_a_stale_file_whose_lock_another_process_has_for_a_moment(tmp_path, monkeypatch):
    left_by(tmp_path, pid=2**22 + 1)
    descriptor = os.open(tmp_path / OWNER_FILE, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(HeldError, match="held by processes that come and go"), owned(tmp_path):
        pass
    monkeypatch.setattr("time.sleep", lambda secs: fcntl.flock(descriptor, fcntl.LOCK_UN))
    assert_taken(tmp_path)
    os.close(descriptor)


def test_a_stale_file_that_another_one_clears_first_is_not_cleared_twice(tmp_path, monkeypatch):
    left_by(tmp_path, pid=2**22 + 1)
    gone = Holder.is_gone

    def is_gone(self, here):
        (tmp_path / OWNER_FILE).unlink()
        left_by(tmp_path)  # of a living process
        monkeypatch.setattr(Holder, "is_gone", gone)
        return True

    monkeypatch.setattr(Holder, "is_gone", is_gone)
    with pytest.raises(HeldError, match=f"is in use by process {os.getpid()} "), owned(tmp_path):
        pass
    assert Holder.read(tmp_path / OWNER_FILE).pid == os.getpid()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"\xff", b'{"pid": 1}', b"[" * 100_000])
def test_a_file_that_says_nothing_is_left(tmp_path, content):
    (tmp_path / OWNER_FILE).write_bytes(content)
    message = r"owner\.json is damaged.*if no process uses .*, remove owner\.json"
    with pytest.raises(HeldError, match=message), owned(tmp_path):
        pass
    assert (tmp_path / OWNER_FILE).read_bytes() == content


def test_an_owner_whose_file_was_removed_or_replaced_notices(tmp_path):
    with owned(tmp_path) as owner:
        (tmp_path / OWNER_FILE).unlink()
        with pytest.raises(HeldError, match="no longer owns the folder"):
            owner.check()
        other = left_by(tmp_path)
        with pytest.raises(HeldError, match="no longer owns the folder"):
            owner.check()
    assert (tmp_path / OWNER_FILE).read_bytes() == other


def test_an_owner_that_writes_often_looks_once_a_second(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.clock_gettime", lambda clock: now[0])
    with owned(tmp_path) as owner:
        now[0] += 5.0
        owner.check_often()
        (tmp_path / OWNER_FILE).unlink()
        for _ in range(3):
            owner.check_often()
            now[0] += 0.3
        now[0] += 600.0  # it sleeps
        for _ in range(2):
            with pytest.raises(HeldError, match="no longer owns the folder"):
                owner.check_often()


def test_a_file_that_cannot_be_removed_is_said_where_nothing_else_went_wrong(tmp_path, monkeypatch):
    def refuse_removal(self, missing_ok):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    for error in (None, CheckpointError("it was damaged")):
        refused = pytest.raises((RunStopped, CheckpointError))
        with monkeypatch.context() as patch, refused as caught, owned(tmp_path):
            patch.setattr(pathlib.Path, "unlink", refuse_removal)
            if error is not None:
                raise error
        if error is None:
            assert isinstance(caught.value, RunStopped)
            assert "all is done, but" in str(caught.value) and "Read-only file system" in str(caught.value)
        else:
            assert caught.value is error
        (tmp_path / OWNER_FILE).unlink()


def test_a_folder_that_was_made_for_it_is_removed_if_it_stays_empty(tmp_path):
    with pytest.raises(KeyError), owned(tmp_path / "a/b"):
        raise KeyError
    assert names(tmp_path) == []
    with owned(tmp_path / "a/b"):
        (tmp_path / "a/b/file").write_text("kept")
    assert names(tmp_path / "a/b") == ["file"]


class TestSystem:
    """Folders that cannot be made or written in: one line, nothing changed."""

    def refused(self, folder, message):
        with pytest.raises(FileError, match=message) as caught, owned(folder):
            pass
        assert "\n" not in str(caught.value)

    def test_below_a_file_and_on_one(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        self.refused(tmp_path / "file", "file cannot be made: File exists; a file, or a link to nothing, is there")
        self.refused(tmp_path / "file/run", "file cannot be made: File exists; a file, or a link to nothing, is there")
        assert (tmp_path / "file").read_text() == "mine"

    def test_links_to_nothing_and_to_themselves(self, tmp_path):
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        self.refused(tmp_path / "link", "link cannot be made: File exists; a file, or a link to nothing")
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        self.refused(tmp_path / "loop/run", "loop cannot be made: File exists; a file, or a link to nothing")
        assert names(tmp_path) == ["link", "loop"]

    def test_a_name_that_is_too_long(self, tmp_path):
        self.refused(tmp_path / ("x" * 300), "File name too long; choose a shorter name")

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (errno.EROFS, "Read-only file system; choose a place that can be written to"),
            (errno.EACCES, "Permission denied; change its permissions"),
            (errno.ENOSPC, "No space left on device; make room on its disk"),
        ],
    )
    @pytest.mark.parametrize("function", ["open", "fsync", "link"])
    def test_refusals(self, tmp_path, monkeypatch, number, message, function):
        monkeypatch.setattr(os, function, refuse(number))
        self.refused(tmp_path, message)
        monkeypatch.undo()
        assert names(tmp_path) == []
        assert_taken(tmp_path)
