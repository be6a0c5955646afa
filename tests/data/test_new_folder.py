import os
import socket
import subprocess
import sys

import pytest

from rat_jax.data.new_folder import new_folder


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
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    prefix = f"a.partial-{socket.gethostname()}"
    for name in (
        f"{prefix}-{dead.pid}",
        f"{prefix}-{os.getppid()}",
        "a.partial-elsewhere-1",
        f"{prefix}-{os.getpid()}",
    ):
        (tmp_path / name).mkdir()
    with new_folder(tmp_path / "a") as folder:
        (folder / "x").touch()
    assert names(tmp_path) == sorted(["a", "a.partial-elsewhere-1", f"{prefix}-{os.getppid()}"])
    assert f"removing {tmp_path / prefix}-{dead.pid}, left by a run that was killed" in capsys.readouterr().err
