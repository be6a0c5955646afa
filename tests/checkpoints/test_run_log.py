"""The log of a run: whatever is in it, a run goes on, and only what is no record is moved."""

import json
import math
import os
import random

import pytest

from rat_jax.checkpoints.run_log import RunLog, read_log
from rat_jax.files import FileError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "log.jsonl"


def write(path, steps):
    log = RunLog(path, 0)
    for step in steps:
        log.append(step, {"loss": 1.0 / step})
    log.close()


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"   ",
        b'{"step": 4, "lo',
        b"\x00\x93\xff\xfe",
        b"[1, 2]",
        b"7",
        b"null",
        b'"step"',
        b"{}",
        b'{"step": null}',
        b'{"step": "4"}',
        b'{"step": 4.0}',
        b'{"step": true}',
        b'{"step": -1}',
        b'{"step": 1e400}',
        b'{"step": ' + b"9" * 30 + b"}",
        b'{"step": ' + b"9" * 5000 + b"}",
        b'{"step": 4} {"step": 5}',
        b"[" * 100_000,
    ],
    ids=lambda line: repr(line[:20]),
)
@pytest.mark.parametrize("place", ["in the midst", "last", "last, without its end"])
def test_lines_that_are_no_records_are_moved_and_named(path, line, place):
    write(path, (1, 2, 3))
    before = path.read_bytes().splitlines(keepends=True)
    number = 1 if place == "in the midst" else 3
    path.write_bytes(b"".join([*before[:number], line, b"" if "without" in place else b"\n", *before[number:]]))
    assert [record["step"] for record in read_log(path)] == [1, 2, 3]
    log = RunLog(path, 3)
    # An empty last line without an end is none.
    assert log.bad_lines == ([] if line == b"" and "without" in place else [number + 1])
    assert path.read_bytes() == b"".join(before)
    if log.bad_lines:
        assert log.bad_file.read_bytes() == line + b"\n"
    log.append(4, {"loss": 0.25})
    log.close()
    assert [record["step"] for record in read_log(path)] == [1, 2, 3, 4]


def test_random_bytes(path):
    generator = random.Random(0)
    for _ in range(100):
        path.write_bytes(generator.randbytes(generator.randrange(200)))
        read_log(path)
        RunLog(path, 10).close()
        assert path.read_bytes() == b""


def test_figures_that_are_no_numbers_are_null(path):
    log = RunLog(path, 0)
    log.append(1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 5})
    log.close()
    (line,) = path.read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail) == {"step": 1, "loss": None, "grad_norm": None, "tokens": 5}
    # As older code wrote it, and what others may have added.
    path.write_text('{"step": 1, "loss": NaN, "mean_loss": -Infinity, "note": "x", "list": [1], "flag": true}\n')
    nothing = {"loss": None, "mean_loss": None, "note": None, "list": None, "flag": None}
    assert read_log(path) == [{"step": 1, **nothing}]
    path.write_text('{"step": 1, "loss": 1' + "0" * 400 + "}\n")
    assert read_log(path) == [{"step": 1, "loss": None}]


def test_it_is_only_appended_to_where_nothing_is_cut(path):
    write(path, (1, 2, 3))
    before = os.stat(path).st_ino
    log = RunLog(path, 3)
    log.append(4, {"loss": 0.25})
    log.close()
    assert os.stat(path).st_ino == before
    assert len(read_log(path)) == 4


def test_it_is_cut_back_to_the_resumed_step_at_once_or_not_at_all(path, monkeypatch):
    write(path, (1, 2, 3, 4))
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(FileError, match=r"log\.jsonl cannot be written: No space left on device; make room"):
            RunLog(path, 2)
        assert path.read_bytes() == before
    log = RunLog(path, 2)
    assert [record["step"] for record in log.records] == [1, 2]
    log.close()
    assert path.read_bytes() == b"".join(before.splitlines(keepends=True)[:2])


def test_a_full_disk_is_an_error_in_one_line(path):
    log = RunLog(path, 0)
    log._file.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(
        FileError, match=r"log\.jsonl cannot be written: No space left on device; make room on its disk"
    ):
        log.append(1, {"loss": 1.0})
    log.close()


def test_a_folder_in_its_place(path):
    path.mkdir()
    for read in (read_log, lambda path: RunLog(path, 0)):
        with pytest.raises(FileError, match=r"log\.jsonl cannot be read: Is a directory"):
            read(path)
