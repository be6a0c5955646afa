"""A prepared corpus: every document once, in its split, with its figures."""

import dataclasses
import gzip
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from rat_jax.data.corpus import SPLITS, byte_entropy
from rat_jax.data.splits import split_of
from rat_jax.data.tokenizer import IdTokenizer, train_bpe
from tests.data.prepared import all_ids, documents, failure, run, texts_of


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
        assert all_ids(corpus.token_file(split)).tolist() == ids[split]
    assert corpus.total.num_documents == 3
    assert corpus.total.num_bytes is corpus.total.byte_entropy_nats is corpus.total.bytes_per_token is None
    assert corpus.tokenizer() == IdTokenizer(32000, 2)
    failure(settings, tmp_path / "out", "name the tokenizer that made them", tokenizer="bpe:300")
    failure(settings, tmp_path / "out", r"train\.bin: token id 9 at position 5 is outside", tokenizer="ids:9:2")
