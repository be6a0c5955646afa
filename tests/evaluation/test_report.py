"""The table and the picture of evaluations."""

import math

import pytest

from rat_jax.evaluation.report import plot, table
from rat_jax.files import FileError
from tests.evaluation.test_perplexity import make_evaluation
from tests.full_disk import fill_disk


def test_the_table_names_every_context():
    short, long = make_evaluation([16.0] * 20, [4.0] * 20, 160), make_evaluation([3.0] * 40, [2.0] * 20 + [0.0] * 20)
    lines = table([short, long]).splitlines()
    assert lines[0] == "loss on the whole validation split"
    assert lines[2].split() == ["20", "80", "4.0000", "54.598", f"{4 / math.log(2) / 2:.4f}"]
    assert lines[3].split()[:3] == ["40", "40", "3.0000"]
    assert [line.split() for line in lines[6:]] == [
        ["positions", "20", "40"],
        ["0", "..", "15", "4.0000", "1.5000"],
        ["16", "..", "31", "4.0000", f"{48 / 8:.4f}"],
        ["32", "..", "39", "-", "-"],
    ]


def test_the_picture(tmp_path):
    plot([make_evaluation([3.0] * 40, [2.0] * 39 + [0.0])], tmp_path / "losses.png", trained_length=16)
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_a_picture_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    (tmp_path / "losses.png").write_bytes(b"the one before")
    fill_disk(monkeypatch, "losses.png")
    with pytest.raises(FileError, match=r"losses\.png cannot be written: No space left on device"):
        plot([make_evaluation([3.0] * 40, [2.0] * 40)], tmp_path / "losses.png", trained_length=16)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("losses.png", b"the one before")]
