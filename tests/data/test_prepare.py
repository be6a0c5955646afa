import dataclasses
import errno
import gzip
import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rat_jax.data import DataError
from rat_jax.data.corpus import SPLITS, Corpus, byte_entropy
from rat_jax.data.encoding import Encoder, encode
from rat_jax.data.prepare import main, prepare
from rat_jax.data.prepare_flags import parse_flags
from rat_jax.data.splits import split_of
from rat_jax.data.tokenizer import ByteTokenizer, IdTokenizer, train_bpe
from rat_jax.files import FileError
from tests.data import format_1

ROOT = pathlib.Path(__file__).parents[2]


def run(settings, out, *, num_workers=0, overwrite=False) -> Corpus:
    return prepare(settings, out, num_workers=num_workers, overwrite=overwrite)


def documents(corpus, split) -> list[str]:
    """What the token file of a split says, as text."""
    tokenizer = corpus.tokenizer()
    ids = corpus.token_file(split).tokens
    assert ids[-1] == tokenizer.eos_id
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    return [tokenizer.decode(part.tolist()) for part in np.split(ids, ends[:-1] + 1)]


def texts_of(folder) -> list[str]:
    return [path.read_text() for path in sorted(folder.iterdir())]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300", "sentencepiece", "huggingface", "corpus"])
def test_every_document_once_and_in_order(settings, text_folder, tmp_path, tokenizer, sentencepiece_model):
    if tokenizer == "sentencepiece":
        path = tmp_path / "tokenizer.model"
        path.write_bytes(sentencepiece_model)
        settings = dataclasses.replace(settings, tokenizer=str(path))
    elif tokenizer == "corpus":
        folder = tmp_path / "earlier"
        folder.mkdir()
        train_bpe(texts_of(text_folder), 300).save(folder)
        settings = dataclasses.replace(settings, tokenizer=str(folder))
    elif tokenizer == "huggingface":
        path = tmp_path / "tokenizer.json"
        path.write_bytes(train_bpe(texts_of(text_folder), 300).model[1])
        settings = dataclasses.replace(settings, tokenizer=str(path), eos_token="<|endoftext|>")
    else:
        settings = dataclasses.replace(settings, tokenizer=tokenizer)
    corpus = run(settings, tmp_path / "corpus")
    expected = {split: [t for t in texts_of(text_folder) if split_of(t, 0.3) == split] for split in SPLITS}
    for split in SPLITS:
        assert len(expected[split]) > 2
        assert documents(corpus, split) == expected[split]
        header = corpus.token_file(split).header
        assert (header.num_documents, header.num_tokens) == (len(expected[split]), corpus.splits[split].num_tokens)
        assert header.tokenizer_hash == corpus.tokenizer_hash == corpus.tokenizer().hash
        assert (header.vocab_size, header.eos_id) == (corpus.tokenizer().vocab_size, corpus.tokenizer().eos_id)
    assert corpus.total.num_documents == 40


def test_statistics(corpus, text_folder):
    content = "".join(texts_of(text_folder)).encode()
    assert corpus.total.num_bytes == len(content)
    assert corpus.total.num_tokens == len(content) + 40
    assert corpus.total.bytes_per_token == len(content) / (len(content) + 40)
    shares = [content.count(bytes([b])) / len(content) for b in set(content)]
    assert corpus.total.byte_entropy_nats == pytest.approx(-sum(p * math.log(p) for p in shares), rel=1e-12)
    for name in ("num_documents", "num_tokens", "num_bytes"):
        assert getattr(corpus.total, name) == sum(getattr(corpus.splits[split], name) for split in SPLITS)
    part = "".join(documents(corpus, "validation")).encode()
    assert corpus.splits["validation"].byte_entropy_nats == byte_entropy(np.bincount(np.frombuffer(part, np.uint8)))


def test_byte_entropy():
    assert byte_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert byte_entropy(np.array([0, 7])) == 0
    assert byte_entropy(np.array([0])) == 0


def test_split_depends_on_each_document_alone(settings, text_folder, tmp_path):
    """Adding, removing or renaming documents moves no other document to the other split; a higher fraction adds."""
    before = run(settings, tmp_path / "before")
    (text_folder / "000.txt").unlink()
    (text_folder / "020.txt").rename(text_folder / "zzz.txt")
    (text_folder / "0000.txt").write_text("new")
    after = run(settings, tmp_path / "after")
    more = run(dataclasses.replace(settings, validation_fraction=0.6), tmp_path / "more")
    kept = set(texts_of(text_folder)) - {"new"}
    for split in SPLITS:
        assert set(documents(before, split)) & kept == set(documents(after, split)) & kept
    assert set(documents(after, "validation")) < set(documents(more, "validation"))


def test_split_fraction():
    splits = [split_of(f"text {i}", 0.2) for i in range(5000)]
    assert abs(splits.count("validation") / 5000 - 0.2) < 0.02
    # Fixed for good: another value would move validation documents into the training split of prepared corpora.
    assert [i for i in range(5000) if splits[i] == "validation"][:8] == [4, 9, 35, 41, 42, 49, 51, 53]


def test_validation_source(settings, tmp_path):
    (tmp_path / "v.jsonl").write_text('{"text": "held out"}\n{"text": ""}\n')
    corpus = run(dataclasses.replace(settings, validation_source=(str(tmp_path / "v.jsonl"),)), tmp_path / "corpus")
    assert documents(corpus, "validation") == ["held out"]
    assert corpus.splits["train"].num_documents == 40


def test_several_sources_and_a_separator(settings, text_folder, tmp_path):
    (tmp_path / "x.txt").write_text("a|b||c|")
    settings = dataclasses.replace(settings, source=(str(tmp_path / "x.txt"), str(text_folder)), document_separator="|")
    corpus = run(dataclasses.replace(settings, validation_source=settings.source), tmp_path / "corpus")
    assert documents(corpus, "train") == documents(corpus, "validation") == ["a", "b", "c", *texts_of(text_folder)]


def test_workers_change_nothing(settings, tmp_path, monkeypatch):
    """Batches of a few documents each, so that many are under way at once."""
    monkeypatch.setattr("rat_jax.data.encoding._BATCH_CHARACTERS", 500)
    settings = dataclasses.replace(settings, tokenizer="bpe:300")
    alone, together = run(settings, tmp_path / "0"), run(settings, tmp_path / "2", num_workers=2)
    assert contents(alone.path) == contents(together.path)


def test_encoding_is_lazy(monkeypatch):
    """A corpus larger than memory: few documents are read ahead of those that were encoded."""
    monkeypatch.setattr("rat_jax.data.encoding._BATCH_CHARACTERS", 10)
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield "train", "ten characters"

    for num_workers, most in ((0, 1), (1, 2)):
        num_read = 0
        parts = encode(endless(), Encoder(ByteTokenizer(), 0.1), num_workers=num_workers)
        for i in range(1, 6):
            assert next(parts).num_documents == 1
            assert num_read <= i + most
        parts.close()


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


def failure(settings, out, message, **changes):
    """The error of a command, which leaves nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(DataError, match=message):
        run(dataclasses.replace(settings, **changes), out)
    assert sorted(out.parent.iterdir()) == before


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


def test_killed_run_leaves_no_corpus(settings, text_folder, tmp_path):
    """Encoding is replaced by waiting, which holds the command in the middle of its work until it is killed."""
    out = tmp_path / "corpus"
    program = (
        "import time, sys, rat_jax.data.prepare as program\n"
        "program.encode = lambda *arguments, **settings: time.sleep(60)\n"
        "program.main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", program, "--source", str(text_folder), "--tokenizer", "bytes", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("corpus.partial-*/train.bin")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not out.exists()
    assert len(list(tmp_path.glob("corpus.partial-*"))) == 1
    assert run(settings, out).total.num_documents == 40
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


def command(source, out, *more) -> list[str]:
    arguments = ["--source", str(source), "--tokenizer", "bytes", "--out", str(out), "--num_workers", "0"]
    return [*arguments, *map(str, more)]


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


LINES = "".join(f"line {i} of one long story\n" for i in range(400))


def test_one_document_is_cut(settings, tmp_path, capsys):
    """As tiny Shakespeare: the tail is for validation, and nothing is lost."""
    (tmp_path / "story.txt").write_text(LINES)
    settings = dataclasses.replace(settings, source=(str(tmp_path / "story.txt"),), validation_fraction=0.05)
    corpus = run(settings, tmp_path / "corpus")
    ((head,), (tail,)) = documents(corpus, "train"), documents(corpus, "validation")
    assert head + tail == LINES
    assert head.endswith("\n") and abs(len(tail) / len(LINES) - 0.05) < 0.01
    said = "no whole document falls into the validation split at --validation_fraction 0.05: the tail of each document"
    assert said in capsys.readouterr().out
    bpe = run(dataclasses.replace(settings, tokenizer="bpe:280"), tmp_path / "bpe")
    assert bpe.tokenizer().hash == train_bpe([head], 280).hash  # validation text stays unseen


def test_a_handful_is_cut(settings, tmp_path):
    """Equal documents are cut equally, so that no whole one is in the other split; short ones stay whole."""
    texts = [LINES, LINES[:3000], LINES, "short"]
    folder = tmp_path / "few"
    folder.mkdir()
    for i, text in enumerate(texts):
        (folder / f"{i}.txt").write_text(text)
    corpus = run(dataclasses.replace(settings, source=(str(folder),), validation_fraction=0.01), tmp_path / "corpus")
    heads, tails = documents(corpus, "train"), documents(corpus, "validation")
    assert [head + tail for head, tail in zip(heads, [*tails, ""], strict=True)] == texts
    assert not set(heads) & set(tails)


def test_an_only_document_that_falls_into_validation_is_cut(settings, tmp_path):
    number = next(i for i in range(1000) if split_of(f"{i}\n{LINES}", 0.05) == "validation")
    (tmp_path / "story.txt").write_text(f"{number}\n{LINES}")
    settings = dataclasses.replace(settings, source=(str(tmp_path / "story.txt"),), validation_fraction=0.05)
    corpus = run(settings, tmp_path / "corpus")
    assert "".join(documents(corpus, "train") + documents(corpus, "validation")) == f"{number}\n{LINES}"


def test_mixed_folder(settings, text_folder, tmp_path, capsys):
    for path in sorted(text_folder.iterdir())[20:]:
        path.unlink()
    plain = set(texts_of(text_folder))
    with gzip.open(text_folder / "b.txt.gz", "wt") as file:
        file.write("packed")
    (text_folder / "c.jsonl").write_text('{"text": "line one"}\n{"text": "\ufeffline two"}\n')
    (text_folder / "d.json").write_text('[{"text": "in an array"}]')
    (text_folder / "e.txt").write_text("sixteen bits", encoding="utf-16")
    (text_folder / "f.txt").write_text("marked", encoding="utf-8-sig")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["in a table"]}), text_folder / "g.parquet")
    corpus = run(settings, tmp_path / "corpus")
    found = documents(corpus, "train") + documents(corpus, "validation")
    assert set(found) - plain == {
        "packed", "line one", "line two", "in an array", "sixteen bits", "marked", "in a table"
    }  # fmt: skip
    expected = "found 23 text files, 1 JSON-lines file, 1 JSON file, 1 Parquet file (1 .gz among them)\n"
    assert expected in capsys.readouterr().out


def test_separator_that_never_occurs(settings, text_folder, tmp_path, capsys):
    """Said once, whether all documents were read before the work, or only by it."""
    settings = dataclasses.replace(settings, document_separator="|||")
    run(settings, tmp_path / "many")
    for path in sorted(text_folder.iterdir())[1:]:
        path.unlink()
    run(settings, tmp_path / "one")
    said = capsys.readouterr().err
    for count in (40, 1):
        warning = f"warning: --document_separator '|||' occurs in no text file ({count} read)"
        assert said.count(warning) == 1
    (text_folder / "x.txt").write_text("a|||b")
    run(settings, tmp_path / "some")
    assert "warning" not in capsys.readouterr().err


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


def test_workers_follow_the_affinity(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 5, 6})
    assert parse_flags(["--out", "x", "--verify"]).num_workers == 3


def test_release_files(settings, tmp_path):
    ids = {"train": [5, 6, 2, 7, 8, 9, 2], "validation": [5, 2]}
    for split in SPLITS:
        np.asarray(ids[split], "<u2").tofile(tmp_path / f"{split}.bin")
    settings = dataclasses.replace(
        settings,
        source=(f"release-bin:{tmp_path / 'train.bin'}",),
        validation_source=(f"release-bin:{tmp_path / 'validation.bin'}",),
        tokenizer="ids:32000:2",
    )
    corpus = run(settings, tmp_path / "corpus")
    for split in SPLITS:
        assert corpus.token_file(split).tokens.tolist() == ids[split]
    assert corpus.total.num_documents == 3
    assert corpus.total.num_bytes is corpus.total.byte_entropy_nats is corpus.total.bytes_per_token is None
    assert corpus.tokenizer() == IdTokenizer(32000, 2)
    failure(settings, tmp_path / "out", "name the tokenizer that made them", tokenizer="bpe:300")
    failure(settings, tmp_path / "out", r"train\.bin: token id 9 at position 5 is outside", tokenizer="ids:9:2")
