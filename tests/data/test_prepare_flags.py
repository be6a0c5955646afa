"""The command line of `prepare`: what it says, what its flags mean, and which it refuses."""

import dataclasses
import json
import os
import re

import pytest

from rat_jax.data.corpus import Corpus
from rat_jax.data.prepare import main
from rat_jax.data.prepare_flags import parse_flags
from tests.data import format_1
from tests.data.prepared import command, documents, texts_of


def test_command_line(text_folder, tmp_path, capsys):
    out = tmp_path / "corpus"
    assert main(command(text_folder, out)) == 0
    printed = capsys.readouterr().out
    for word in ("found 40 text files", "train", "validation", "total", "40 documents", "bytes/token", "nats/byte"):
        assert word in printed
    assert main(command(text_folder, out)) == 0
    assert "already prepared" in capsys.readouterr().out
    assert main(command(text_folder, out, "--field", "body")) == 2
    assert "error: " in (said := capsys.readouterr().err) and " was prepared with other settings" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "x", "--tokenizer", "bytes"], "--source is missing"),
        (["--out", "x", "--source", "x"], "--tokenizer is missing"),
        (["--out", "x", "--source", "x", "--tokenizer", "bytes", "--sauce", "y"], "unrecognized arguments: --sauce y"),
        (["--out", "x", "--num_workers", "many"], "--num_workers: invalid int value: 'many'"),
        (["--out", "x", "--document_separator", r"\d"], r"--document_separator: '\\\\d' is none of \\n, \\r, \\t and"),
        (["--out", "x", "--verify", "--source", "x"], "--verify stands alone with --out, or"),
        (
            ["--out", "gs://b/c", "--source", "x", "--tokenizer", "bytes"],
            "--out is 'gs://b/c': gs:// is not read direc",
        ),
        (["--out", "x", "--source", "s3://b/c", "--tokenizer", "bytes"], "s3:// is not read directly: mount it"),
        (["--out", "x", "--source", "text:s3://b", "--tokenizer", "bytes"], "s3:// is not read directly: mount it"),
        (
            ["--out", "x", "--source", "x", "--tokenizer", "gs://b/c"],
            "--tokenizer is 'gs://b/c': gs:// is not read dir",
        ),
        (["--out", "x", "--source", "hf://a", "--tokenizer", "bytes"], "hf:// is not read directly: mount it"),
    ],
)
def test_flags_that_are_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert re.match(f"error: .*{message}", said)
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_several_values_after_one_flag(text_folder, tmp_path, capsys):
    """As a shell writes `texts/*.txt` that is not in quotes."""
    names = sorted(map(str, text_folder.iterdir()))
    arguments = command(names[0], tmp_path / "corpus", "--source", *names[1:20], "--validation_source", *names[20:])
    assert main(arguments) == 0
    corpus = Corpus.open(tmp_path / "corpus")
    assert documents(corpus, "train") == texts_of(text_folder)[:20]
    assert documents(corpus, "validation") == texts_of(text_folder)[20:]
    assert "found 20 text files\nfound for validation 20 text files\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "meant"), [(r"\n\n", "\n\n"), ("\n", "\n"), (r"\t|\r\n", "\t|\r\n"), (r"\\n", r"\n"), ("<|end|>",) * 2]
)
def test_separator_on_the_command_line(tmp_path, typed, meant):
    """Quotes keep a shell from reading escapes; a corpus of the characters themselves is the same."""
    (tmp_path / "x.txt").write_text(meant.join("abcdef") * 20)
    arguments = command(tmp_path / "x.txt", tmp_path / "corpus", "--validation_source", tmp_path / "x.txt")
    assert main([*arguments, "--document_separator", typed]) == 0
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.settings["document_separator"] == meant
    assert documents(corpus, "train")[:3] == ["a", "b", "c"]


def test_verify(corpus, capsys):
    assert main(["--out", str(corpus.path), "--verify"]) == 0
    assert "verified, every token is as it was written" in capsys.readouterr().out
    content = bytearray((corpus.path / "train.bin").read_bytes())
    content[-100] ^= 1
    (corpus.path / "train.bin").write_bytes(content)
    assert main(["--out", str(corpus.path), "--verify"]) == 2
    error = capsys.readouterr().err
    assert "train.bin" in error
    assert "is not what was written there: the file was changed" in error


def test_paths_are_absolute(settings, text_folder, tmp_path, monkeypatch, capsys):
    """However a path is written, the settings hold the same; those of earlier versions hold what was written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(command("~/texts", "~/corpus")) == 0
    corpus = Corpus.open(tmp_path / "corpus")
    assert corpus.settings["source"] == [str(text_folder)]
    for source, out in (("texts", "corpus"), ("./texts", tmp_path / "corpus"), (text_folder, "~/corpus")):
        capsys.readouterr()
        assert main(command(source, out)) == 0
        assert "already prepared" in capsys.readouterr().out
    format_1.rewrite_corpus(tmp_path / "corpus")
    path = tmp_path / "corpus" / "metadata.json"
    values = json.loads(path.read_text())
    values["settings"]["source"] = ["texts"]
    path.write_text(json.dumps(values))
    assert main(command(text_folder, "corpus")) == 0
    monkeypatch.chdir(text_folder)
    assert main(command(text_folder, "~/corpus")) == 2
    assert "source: ['" in capsys.readouterr().err


def test_paths_of_every_kind_are_absolute(settings, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    specs = ("x/*.txt", "text:x", "jsonl:x", "parquet:x", "release-bin:x", "hf:a/b:c", "recall:3", "python-stdlib")
    absolute = dataclasses.replace(
        settings, source=specs, validation_source=specs, tokenizer="tokenizer.json"
    ).absolute()
    here = str(tmp_path)
    expected = (f"{here}/x/*.txt", *(f"{kind}:{here}/x" for kind in ("text", "jsonl", "parquet", "release-bin")))
    assert absolute.source == absolute.validation_source == (*expected, *specs[5:])
    assert absolute.tokenizer == f"{here}/tokenizer.json"
    assert absolute.absolute() == absolute


def test_workers_follow_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert parse_flags(["--out", "x", "--verify"]).num_workers == 3
