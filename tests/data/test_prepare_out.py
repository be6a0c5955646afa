"""The folder that `prepare` writes: complete, or as it was; found finished, or refused."""

import dataclasses
import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus
from rat_jax.data.encoding import encode
from rat_jax.data.prepare import main
from rat_jax.data.tokenizer import train_bpe
from rat_jax.files import FileError
from tests.commands import ends, import_path
from tests.data.prepared import command, contents, failure, run, texts_of


def test_same_command_again(settings, tmp_path, capsys):
    before = contents(run(settings, tmp_path / "corpus").path)
    assert "already prepared" not in capsys.readouterr().out
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").iterdir()}
    run(settings, tmp_path / "corpus")
    assert "corpus: already prepared" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "corpus").iterdir()} == times
    assert contents(tmp_path / "corpus") == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source", ("python-stdlib",)),
        ("validation_source", ("python-stdlib",)),
        ("validation_fraction", 0.4),
        ("tokenizer", "bpe:300"),
        ("eos_token", "<end>"),
        ("field", "body"),
        ("document_separator", "|"),
        ("invalid_utf8", "replace"),
    ],
)
def test_other_settings_are_refused(settings, corpus, field, value):
    before = contents(corpus.path)
    with pytest.raises(DataError, match=rf"prepared with other settings \({field}: .* --overwrite"):
        run(dataclasses.replace(settings, **{field: value}), corpus.path)
    assert contents(corpus.path) == before


def test_overwrite(settings, corpus):
    again = run(dataclasses.replace(settings, tokenizer="bpe:300"), corpus.path, overwrite=True)
    assert again.tokenizer().vocab_size == 300
    assert [path.name for path in corpus.path.parent.iterdir() if "corpus" in path.name] == ["corpus"]


def test_tokenizer_file_that_changed(settings, text_folder, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(train_bpe(texts_of(text_folder), 300).model[1])
    settings = dataclasses.replace(settings, tokenizer=str(path), eos_token="<|endoftext|>")
    run(settings, tmp_path / "corpus")
    run(settings, tmp_path / "corpus")
    path.write_bytes(train_bpe(texts_of(text_folder), 290).model[1])
    with pytest.raises(DataError, match=r"tokenizer\.json held before it was changed"):
        run(settings, tmp_path / "corpus")


def test_damaged_corpus_is_not_taken_for_finished(settings, corpus):
    with (corpus.path / "validation.bin").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"validation\.bin has \d+ bytes"):
        run(settings, corpus.path)


@pytest.mark.parametrize("overwrite", [False, True])
def test_foreign_folders_are_left_alone(settings, tmp_path, overwrite):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "chapter.tex").write_text("years of work")
    for out in (folder, folder / "chapter.tex"):
        with pytest.raises(DataError, match="exists and is not a prepared corpus; it is left alone"):
            run(settings, out, overwrite=overwrite)
    assert contents(folder) == {"chapter.tex": b"years of work"}


def test_empty_and_deep_folders(settings, tmp_path):
    (tmp_path / "empty").mkdir()
    assert run(settings, tmp_path / "empty").total.num_documents == 40
    assert run(settings, tmp_path / "a" / "b" / "c").total.num_documents == 40


def test_errors_leave_nothing_behind(settings, text_folder, tmp_path):
    out = tmp_path / "out"
    failure(settings, out, "fraction must lie between 0 and 1, got 1.5", validation_fraction=1.5)
    failure(settings, out, r"no documents in the validation split: 40 documents at", validation_fraction=1e-9)
    failure(settings, out, r"no documents in the train split: 40 documents at", validation_fraction=1 - 1e-9)
    failure(settings, out, "bpe:SIZE", tokenizer="gpt")
    failure(settings, out, "must be a number", tokenizer="bpe:many")
    failure(settings, out, "ids separated by spaces", tokenizer="ids:9:0")
    failure(settings, out, r"gone\.json cannot be read", tokenizer="gone.json")
    failure(settings, out, "too small for bpe:100000", tokenizer="bpe:100000")
    failure(settings, out, "give one training file", source=(f"release-bin:{text_folder}",))
    (tmp_path / "blank.txt").touch()
    blank = str(tmp_path / "blank.txt")
    failure(settings, out, "empty corpus: 1 text file, and no text in it", source=(blank,))
    failure(settings, out, "validation split: --validation_source holds no text", validation_source=(blank,))
    failure(settings, out, "train split: --source holds", source=(blank,), validation_source=settings.source)
    (text_folder / "020.txt").write_bytes(b"\xff")
    failure(settings, out, r"020\.txt is not UTF-8 at byte 0")
    with pytest.raises(DataError, match="--num_workers must be 0 or more"):
        run(settings, out, num_workers=-1)
    with pytest.raises(DataError, match=r"020\.txt is not UTF-8 at byte 0"):
        run(settings, out, num_workers=1)
    assert run(dataclasses.replace(settings, invalid_utf8="replace"), out).total.num_documents == 40


WAITING = """
import os, pathlib, sys, time
from rat_jax.data.encoding import Encoder

class Waiting(Encoder):
    def encode(self, documents):
        pathlib.Path(f"at-work-{os.getpid()}").touch()
        time.sleep(60)

if __name__ == "__main__":
    import rat_jax.data.prepare as program
    program.Encoder = Waiting
    sys.exit(program.main())
"""


def test_killed_run_leaves_no_process_and_no_corpus(settings, text_folder, tmp_path):
    """Encoding is replaced by waiting, which holds the workers at their work until the command is killed."""
    for name in "ab":  # one for each worker
        (text_folder / f"{name}.txt").write_text("word " * 210_000)
    out, file = tmp_path / "corpus", tmp_path / "waiting.py"
    file.write_text(WAITING)
    arguments = ["--source", text_folder, "--tokenizer", "bytes", "--out", out, "--num_workers", "2"]
    process = subprocess.Popen(
        [sys.executable, file, *map(str, arguments)],
        cwd=tmp_path,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": import_path()},
    )
    try:
        deadline = time.monotonic() + 60
        while len(at_work := list(tmp_path.glob("at-work-*"))) < 2:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    for path in at_work:
        assert ends(int(path.name.removeprefix("at-work-"))), "a worker outlives its parent"
    assert not out.exists()
    (partial,) = tmp_path.glob("corpus.partial-*")
    with pytest.raises(DataError):
        Corpus.open(partial)
    assert run(settings, out).total.num_documents == 42
    assert not list(tmp_path.glob("corpus.partial-*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_leaves_all_as_it_was(corpus, text_folder, monkeypatch, capsys, number):
    """A signal in the middle of the work, while a corpus is replaced."""

    def interrupted(*arguments, **settings):
        os.kill(os.getpid(), number)
        time.sleep(60)

    before = contents(corpus.path)
    beside = sorted(corpus.path.parent.iterdir())
    monkeypatch.setattr("rat_jax.data.prepare.encode", interrupted)
    assert main(command(text_folder, corpus.path, "--overwrite", "--field", "body")) == 75
    assert "interrupted, and nothing is lost; the same command starts again" in capsys.readouterr().err
    assert contents(corpus.path) == before
    assert sorted(corpus.path.parent.iterdir()) == beside


def test_refused_before_the_work(settings, text_folder, tmp_path, monkeypatch):
    """Whatever is wrong with the first record of a file, nothing has been trained or encoded."""

    def work(*arguments, **settings):
        raise AssertionError("the work began")

    monkeypatch.setattr("rat_jax.data.prepare.encode", work)
    monkeypatch.setattr("rat_jax.data.prepare.train_bpe", work)
    settings = dataclasses.replace(settings, tokenizer="bpe:300")
    out = tmp_path / "out"
    failure(settings, out, "bpe:256 is below 257", tokenizer="bpe:256")
    failure(settings, out, "--eos_token is for tokenizers that are read from a file", eos_token="<end>")
    failure(settings, out, "--document_separator is empty", document_separator="")
    failure(settings, out, "no documents in the validation split", validation_fraction=1e-9)
    failure(settings, out, r"gone\.json cannot be read", tokenizer="gone.json")
    for name, content, message in (
        ("z.jsonl", b'{"body": "x"}', r"z\.jsonl, line 1 has no field 'text' \(it has: body\)"),
        ("z.json", b'{"name": "x"}', r"z\.json, line 1 has no field 'text'"),
        ("z.parquet", b"PAR1", r"z\.parquet is not a Parquet file"),
        ("z.png", b"\x89PNG\r\n\x1a\n\0", r"z\.png is binary, not text"),
        ("z.txt.gz", b"\x1f\x8b\x08\0", r"z\.txt\.gz cannot be read: it is damaged or cut short"),
    ):
        (text_folder / name).write_bytes(content)
        failure(settings, out, message)
        (text_folder / name).unlink()


def test_errors_of_the_system(settings, corpus, text_folder, tmp_path, monkeypatch, capsys):
    before = contents(corpus.path)
    beside = sorted(tmp_path.iterdir())
    failed = []

    def full(*arguments):
        failed.extend(arguments)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("rat_jax.data.token_file.TokenFileWriter.append", full)
        assert main(command(text_folder, corpus.path, "--overwrite", "--field", "body")) == 2
    assert failed[0]._file.closed
    assert capsys.readouterr().err.endswith(
        f"error: {corpus.path} cannot be written: No space left on device; make room on its disk\n"
    )
    with monkeypatch.context() as patch:
        patch.setattr("rat_jax.data.utf8_file._unpacked", full)
        assert main(command(text_folder, corpus.path, "--overwrite", "--field", "body")) == 2
    assert "000.txt cannot be read: No space left on device" in capsys.readouterr().err
    assert contents(corpus.path) == before
    assert sorted(tmp_path.iterdir()) == beside


def test_out_that_cannot_be_made(settings, text_folder, tmp_path, monkeypatch):
    """Before the work, each with its reason."""
    monkeypatch.setattr("rat_jax.data.prepare.encode", lambda *arguments, **settings: pytest.fail("the work began"))
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for out, message in (
        (tmp_path / "file" / "out", r"--out .*out lies below .*file, which is a file: choose"),
        (tmp_path / "file" / "a" / "out", r"lies below .*file, which is a file: choose another place"),
        (tmp_path / "link", "link is a link to .*gone, which does not exist"),
        (tmp_path / ("x" * 250), "cannot be made: File name too long; choose a shorter name"),
    ):
        with pytest.raises((DataError, FileError), match=message):
            run(settings, out)
    monkeypatch.setattr("os.path.ismount", lambda path: True)
    with pytest.raises(DataError, match="is a mount point, which no folder can replace: name a folder in it"):
        run(settings, tmp_path / "out")


def test_out_may_be_a_link_to_a_folder(settings, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    assert run(settings, tmp_path / "link").total.num_documents == 40
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "train.bin").is_file()
    run(dataclasses.replace(settings, field="body"), tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()


def test_out_that_another_program_made_meanwhile(settings, tmp_path, monkeypatch):
    def made_meanwhile(*arguments, **keywords):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "x").touch()
        return encode(*arguments, **keywords)

    monkeypatch.setattr("rat_jax.data.prepare.encode", made_meanwhile)
    with pytest.raises(DataError, match="was made by another process in the meantime; it is left as it is"):
        run(settings, tmp_path / "out")
    assert list(contents(tmp_path / "out")) == ["x"]
