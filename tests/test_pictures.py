"""Pictures as files."""

import pytest
from matplotlib.figure import Figure

from rat_jax.files import FileError
from rat_jax.pictures import write_picture
from tests.full_disk import fill_disk


def test_a_full_disk_leaves_the_earlier_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    write_picture(Figure(), path)
    before = path.read_bytes()
    assert before.startswith(b"\x89PNG")
    fill_disk(monkeypatch, "a.png")
    with pytest.raises(FileError, match=r"a\.png cannot be written: No space left"):
        write_picture(Figure(), path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [before]
