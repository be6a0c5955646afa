import dataclasses
import math
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from rat_jax.data import DataError
from rat_jax.data.corpus import SPLITS, Corpus, byte_entropy
from rat_jax.data.encoding import Encoder, encode, split_of
from rat_jax.data.prepare import main, prepare
from rat_jax.data.tokenizer import ByteTokenizer, IdTokenizer, train_bpe

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
    failure(settings, out, r"empty corpus: .*blank\.txt holds no text", source=(blank,))
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
    """A pipe among the texts holds the command in the middle of its work until it is killed."""
    os.mkfifo(text_folder / "999.txt")
    out = tmp_path / "corpus"
    command = [sys.executable, "-m", "rat_jax.data.prepare", "--source", str(text_folder), "--tokenizer", "bytes"]
    command += ["--out", str(out), "--num_workers", "0", "--validation_fraction", "0.3"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
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
    (text_folder / "999.txt").unlink()
    assert run(settings, out).total.num_documents == 40
    assert not list(tmp_path.glob("corpus.partial-*"))


def test_command_line(text_folder, tmp_path, capsys):
    arguments = ["--source", str(text_folder), "--tokenizer", "bytes", "--out", str(tmp_path / "corpus")]
    main([*arguments, "--num_workers", "0"])
    printed = capsys.readouterr().out
    for word in ("train", "validation", "total", "40 documents", "bytes/token", "nats/byte"):
        assert word in printed
    main(arguments)
    assert "already prepared" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"error: .* was prepared with other settings"):
        main([*arguments, "--field", "body"])


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
