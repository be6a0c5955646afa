"""The command: one page, or one line that says what is wrong and nothing changed."""

import pytest

from rat_jax.report import __main__ as report
from tests.report.html_page import Page
from tests.report.workdirs import make_workdir


@pytest.fixture
def run(tmp_path):
    return make_workdir(tmp_path / "run")


def refused(capsys, *arguments):
    """The line of a command that ends with 2."""
    assert report.main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err


def test_a_page_is_written_and_written_anew(run, tmp_path, capsys):
    out, other = tmp_path / "report.html", make_workdir(tmp_path / "other")
    assert report.main([str(run), "--out", str(out)]) == 0
    first = out.read_bytes()
    said = capsys.readouterr()
    assert said.out == f"{out}: 1 run(s), {len(first):,} bytes\n" and said.err == ""
    assert report.main([str(run), str(other), "--out", str(out)]) == 0
    assert capsys.readouterr().out.endswith(" bytes, in place of an earlier page\n")
    assert Page(out.read_bytes()).headings[0] == "2 runs: run, other"
    assert not list(tmp_path.glob("*.partial"))


def test_what_is_no_workdir(run, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "empty").mkdir()
    out = tmp_path / "report.html"
    for path, reason in (
        (tmp_path / "none", "there is no workdir"),
        (tmp_path / "file", "is no folder"),
        (tmp_path / "empty", "is not the workdir of a run: it has no run.json"),
        ("", "WORKDIR must be a path"),
        ("gs://bucket/run", "WORKDIR is 'gs://bucket/run'"),
        (tmp_path / "empty" / ".." / "run", "is named twice"),
    ):
        assert reason in refused(capsys, run, path, "--out", out)
    assert not out.exists()


def test_where_no_page_can_be(run, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    for out, reason in (
        (tmp_path, "which is a folder: name a file in it"),
        (tmp_path / "none" / "report.html", f"there is no folder {tmp_path / 'none'}: make it"),
        (tmp_path / "mine.txt" / "report.html", "there is no folder"),
        (tmp_path / "mine.txt", "is there already and is no page of this program"),
        (run / "log.jsonl", "is there already and is no page of this program"),
        ("", "--out must be a path"),
        (tmp_path / ("x" * 300), "choose a shorter name"),
    ):
        assert reason in refused(capsys, run, "--out", out)
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_flags(run, capsys):
    assert "--out" in refused(capsys, run)
    assert "WORKDIR" in refused(capsys, "--out", "report.html")
    assert "unrecognized arguments: --title" in refused(capsys, run, "--out", "x.html", "--title", "y")
