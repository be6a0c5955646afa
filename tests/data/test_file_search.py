import os
import pathlib

import pytest

from rat_jax.data import DataError
from rat_jax.data.file_search import ending, find_files
from rat_jax.paths import PathError


def find(pattern, is_wanted=lambda path: True):
    """The names found below the folder that `pattern` begins with, and the notes."""
    notes = []
    found = find_files(str(pattern), is_wanted, "files", notes.append)
    return [str(path) for path in found], notes


@pytest.fixture
def folder(tmp_path):
    for name in ("set/b.txt", "set/a.md", "set/sub/c.txt", "set/.hidden", "set/.git/d.txt", "other/e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(name)
    return tmp_path / "set"


def test_linked_folders_are_followed(folder, tmp_path):
    (folder / "link").symlink_to(tmp_path / "other")
    names = [f"{folder}/{name}" for name in ("a.md", "b.txt", "link/e.txt", "sub/c.txt")]
    assert find(folder) == (names, [f"following the link {folder}/link to {tmp_path}/other"])


def test_every_folder_once(folder, tmp_path):
    """Loops end, and a folder that two names lead to keeps its own."""
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "a_link").symlink_to(folder / "sub")
    (folder / "out").symlink_to(tmp_path / "other")
    (tmp_path / "other" / "back").symlink_to(folder / "sub")
    (tmp_path / "other" / "again").symlink_to(tmp_path / "other")
    found, notes = find(folder)
    assert found == [f"{folder}/{name}" for name in ("a.md", "b.txt", "out/e.txt", "sub/c.txt")]
    assert len(notes) == 5
    assert f"the link {folder}/a_link leads to a folder that is read already" in notes


def test_patterns_that_follow_loops(folder, tmp_path):
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "out").symlink_to(tmp_path / "other")
    found, (note,) = find(f"{folder}/**/*.txt")
    assert found == [f"{folder}/{name}" for name in ("b.txt", "out/e.txt", "sub/c.txt")]
    assert "links to folders lead to files that are read already: " in note


def test_a_folder_below_a_link_that_was_read(folder, tmp_path):
    (tmp_path / "other" / "deep").mkdir()
    (tmp_path / "other" / "deep" / "f.txt").touch()
    (folder / "1").symlink_to(tmp_path / "other" / "deep")
    (folder / "2").symlink_to(tmp_path / "other")
    found, _ = find(folder)
    assert [name for name in found if name.endswith("f.txt")] == [f"{folder}/1/f.txt"]


def test_dangling_links_are_named(folder):
    (folder / "x.txt").symlink_to(folder / "gone")
    for pattern in (folder, folder / "x.txt", folder / "*.txt"):
        with pytest.raises(DataError, match=r"x\.txt cannot be read: No such file.*a link to .*gone; mend or remove"):
            find(pattern)
    (folder / "x.txt").unlink()
    (folder / "x.txt").symlink_to(folder / "x.txt")
    with pytest.raises(DataError, match=r"x\.txt cannot be read"):
        find(folder)


def test_paths_are_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder))
    for pattern in ("set/*.txt", "./set/b.txt", "~/b.txt", "~/*.txt"):
        assert find(pattern)[0] == [f"{folder}/b.txt"]
    with pytest.raises(PathError, match="gs:// is not read directly: mount it"):
        find("gs://bucket/texts")


def test_folder_that_cannot_be_read(folder, monkeypatch):
    """A part of a folder is not left out in silence."""
    scandir = os.scandir

    def refuse(path):
        if pathlib.Path(path).name == "sub":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match="sub cannot be read: Permission denied; change its permissions"):
        find(folder)


def test_ending():
    names = {
        "x.TXT": ".txt",
        "x.jsonl.gz": ".jsonl",
        "a.b.json": ".json",
        "x.gz": "",
        "README": "",
        "x.parquet.zst": ".parquet",
    }
    assert {name: ending(pathlib.Path(name)) for name in names} == names
