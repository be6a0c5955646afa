import os
import socket
import subprocess
import sys

import pytest

from rat_jax.data import DataError
from rat_jax.data.new_folder import new_folder
from rat_jax.files import FileError


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_appears_at_the_end_by_renaming(tmp_path):
    path = tmp_path / "a" / "b"
    with new_folder(path) as folder:
        (folder / "x").touch()
        inode = folder.stat().st_ino
        assert not path.exists()
    assert names(path) == ["x"]
    assert path.stat().st_ino == inode  # in one step, not copied
    assert names(path.parent) == ["b"]


def test_replaces_what_was_there(tmp_path):
    for name in ("x", "y"):
        with new_folder(tmp_path / "a") as folder:
            (folder / name).touch()
    assert names(tmp_path / "a") == ["y"]
    assert names(tmp_path) == ["a"]


def test_failure_leaves_what_was_there(tmp_path):
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a") as folder:
        (folder / "y").touch()
        raise RuntimeError
    assert names(tmp_path / "a") == ["x"]
    assert names(tmp_path) == ["a"]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("failure", [OSError, KeyboardInterrupt])
def test_failure_while_replacing(tmp_path, monkeypatch, failure):
    """The old folder has made way, and the new one cannot take its name."""
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").touch()
    rename = os.rename

    def fail(source, target):
        if ".partial-" in str(source):
            raise failure
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(failure), new_folder(tmp_path / "a") as folder:
        (folder / "y").touch()
    assert names(tmp_path / "a") == ["x"]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("new_is_there", [False, True])
def test_killed_while_replacing(tmp_path, capsys, new_is_there):
    """The old folder comes back, or goes if the new one has its name."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    old = tmp_path / f"a.old-{socket.gethostname()}-{dead.pid}"
    old.mkdir()
    (old / "x").touch()
    if new_is_there:
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "y").touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a"):
        raise RuntimeError
    assert names(tmp_path / "a") == (["y"] if new_is_there else ["x"])
    assert names(tmp_path) == ["a"]
    assert str(old) in capsys.readouterr().err


def test_removes_leftovers_of_the_dead_only(tmp_path, capsys):
    dead, prefix = dead_pid(), f"a[1].partial-{socket.gethostname()}"
    left_alone = [f"{prefix}-{os.getppid()}", "a[1].partial-elsewhere-1", f"{prefix}-x", "a1.partial"]
    for name in (f"{prefix}-{dead}", f"{prefix}-{10**30}", f"{prefix}-{os.getpid()}", *left_alone):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "a[1]") as folder:
        (folder / "x").touch()
    assert names(tmp_path) == sorted(["a[1]", *left_alone])
    assert f"removing {tmp_path / prefix}-{dead}, left by a run that was killed" in capsys.readouterr().err


def test_what_a_killed_process_moved_aside_comes_back(tmp_path, capsys):
    old = tmp_path / f"a.old-{socket.gethostname()}-{dead_pid()}"
    old.mkdir()
    (old / "x").touch()
    with pytest.raises(RuntimeError), new_folder(tmp_path / "a"):
        raise RuntimeError
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["x"]
    assert f"a is back from {old}, where a run that was killed had moved it" in capsys.readouterr().err
    old.mkdir()  # killed after its new folder had its name
    with new_folder(tmp_path / "a") as folder:
        (folder / "y").touch()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["y"]


def test_a_failing_exchange_leaves_what_was_there(tmp_path, monkeypatch):
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").touch()
    rename = os.rename

    def fail(source, target):
        if ".partial-" in str(source):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with (
        pytest.raises(FileError, match="a cannot be made: No space left on device; make room"),
        new_folder(tmp_path / "a") as folder,
    ):
        (folder / "y").touch()
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["x"]


def test_the_quicker_of_two_processes_wins(tmp_path):
    with pytest.raises(DataError, match="a was made by another process in the meantime"), new_folder(tmp_path / "a"):
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "x").touch()
    assert names(tmp_path / "a") == ["x"]
    assert names(tmp_path) == ["a"]


def test_links_are_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "a")
    for name in ("x", "y"):
        with new_folder(tmp_path / "a") as folder:
            (folder / name).touch()
        assert (tmp_path / "a").is_symlink()
        assert names(tmp_path / "disk" / "a") == [name]
    assert names(tmp_path / "disk") == ["a"]


def test_a_path_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(FileError, match=r"cannot be made: (Not a directory|File exists)"),
        new_folder(tmp_path / "file" / "a"),
    ):
        pass
