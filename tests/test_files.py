"""Files of lines; the other ways to write are tested by what they are for."""

import pytest

from rat_jax.files import FileError, check_new_file, write_lines
from tests.full_disk import fill_disk


def test_lines(tmp_path):
    path = tmp_path / "new" / "a.jsonl"
    assert write_lines(path, iter(["a", "ö"])) == 2
    assert path.read_bytes() == "a\nö\n".encode()
    with pytest.raises(FileError, match=r"a\.jsonl is there already; it is left as it is"):
        check_new_file(path)
    check_new_file(tmp_path / "another")


def test_nothing_is_left_of_lines_that_end_early(tmp_path, monkeypatch):
    def lines():
        yield "a"
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_lines(tmp_path / "a", lines())
    fill_disk(monkeypatch, "b")
    with pytest.raises(FileError, match="b cannot be written: No space left"):
        write_lines(tmp_path / "b", ["a"])
    assert list(tmp_path.iterdir()) == []
