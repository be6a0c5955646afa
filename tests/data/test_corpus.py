"""What a prepared corpus says of its text and of its files: bits a byte add up, and what was changed is refused."""

import dataclasses
import json
import math
import random
import shutil

import numpy as np
import pytest

from rat_jax.data import DataError
from rat_jax.data.corpus import SPLITS, Corpus, Statistics, byte_entropy
from rat_jax.data.json_object import checksum
from rat_jax.data.pipeline import ValidationData
from rat_jax.data.prepare import prepare
from rat_jax.data.token_file import TokenFile, TokenFileWriter
from rat_jax.data.token_header import HEADER_BYTES
from rat_jax.data.tokenizer import ByteTokenizer
from rat_jax.data_config import DataConfig
from tests.data import format_1
from tests.data.damage import damaged, damaged_values


def read_metadata(corpus) -> dict:
    return json.loads((corpus.path / "metadata.json").read_text())


def write_metadata(corpus, values, *, right_checksum=True) -> None:
    if right_checksum:
        contents = {name: value for name, value in values.items() if name not in ("format_version", "checksum")}
        values = values | {"checksum": checksum(contents)}
    (corpus.path / "metadata.json").write_text(json.dumps(values))


def flip(path, position, bit=1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= bit
    path.write_bytes(content)


def set_header(path, **changes) -> None:
    """Another header whose own checksum is right."""
    header = dataclasses.replace(TokenFile.open(path).header, **changes)
    path.write_bytes(header.to_bytes() + path.read_bytes()[HEADER_BYTES:])


def test_what_is_written_is_read(corpus):
    again = Corpus.open(corpus.path)
    assert again == corpus
    corpus.write_metadata()
    assert Corpus.open(corpus.path) == corpus
    seen = []
    corpus.verify(progress=seen.append)
    assert sum(seen) == 2 * corpus.total.num_tokens  # bytes of uint16


def test_missing_and_unreadable(corpus, tmp_path):
    with pytest.raises(DataError, match=r"is not a prepared corpus: it has no metadata\.json; make one with"):
        Corpus.open(tmp_path / "gone")
    with pytest.raises(
        DataError, match=r"train\.bin/metadata\.json cannot be read: Not a directory; a part of its path"
    ):
        Corpus.open(corpus.path / "train.bin")
    (corpus.path / "metadata.json").unlink()
    (corpus.path / "metadata.json").mkdir()
    with pytest.raises(DataError, match=r"metadata\.json cannot be read: Is a directory"):
        Corpus.open(corpus.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 9}, "format version 9; this code reads versions 1 and 2"),
        ({"format_version": [2]}, r"format version \[2\]"),
        ({"splits": {}}, r"metadata\.json is damaged: splits are not of train and validation"),
        ({"splits": {"train": 1, "validation": 2}}, r"metadata\.json, train is damaged: expected a JSON object, got 1"),
        ({"total": {"num_bytes": 3}}, r"metadata\.json, total is damaged: it has no num_documents"),
        ({"settings": []}, r"metadata\.json is damaged: settings must be of type dict\[str, Any\], got \[\]"),
        ({"header_hashes": None}, r"metadata\.json is damaged: header_hashes are of another version"),
        ({"color": "red"}, r"metadata\.json is damaged: unknown field 'color'"),
    ],
)
def test_metadata_that_cannot_be(corpus, change, message):
    write_metadata(corpus, read_metadata(corpus) | change)
    with pytest.raises(DataError, match=message):
        Corpus.open(corpus.path)


def test_figures_that_cannot_be(corpus):
    values = read_metadata(corpus)
    for field, value in (
        ("num_tokens", 0),
        ("num_documents", -1),
        ("num_bytes", -5),
        ("num_padding", -1),
        ("byte_entropy_nats", 6.0),
    ):
        train = values["splits"]["train"] | {field: value}
        write_metadata(corpus, values | {"splits": values["splits"] | {"train": train}})
        with pytest.raises(DataError, match=rf"metadata\.json, train is damaged: {field} is {value}"):
            Corpus.open(corpus.path)
    for value in (10**400, math.nan, True):
        train = values["splits"]["train"] | {"byte_entropy_nats": value}
        write_metadata(corpus, values | {"splits": values["splits"] | {"train": train}})
        with pytest.raises(DataError, match=r"byte_entropy_nats must be a finite number or None, got (1000|nan|True)"):
            Corpus.open(corpus.path)
    total = values["total"] | {"num_bytes": values["total"]["num_bytes"] + 1}
    write_metadata(corpus, values | {"total": total})
    with pytest.raises(DataError, match="num_bytes of the splits do not add up to the total"):
        Corpus.open(corpus.path)


def test_any_edit_of_the_metadata_is_noticed(corpus):
    values, generator = read_metadata(corpus), random.Random(0)
    for _ in range(300):
        write_metadata(corpus, damaged_values(values, generator), right_checksum=False)
        with pytest.raises(DataError, match=r"metadata\.json"):
            Corpus.open(corpus.path)


def test_damaged_metadata_is_refused_or_means_the_same(corpus):
    """A blank more or less is no damage."""
    path = corpus.path / "metadata.json"
    content, generator, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(300):
        path.write_bytes(damaged(content, generator))
        try:
            assert Corpus.open(corpus.path) == corpus
        except DataError as error:
            refused += 1
            assert "metadata.json" in str(error)
    assert refused > 250


def test_damaged_metadata_of_format_1_is_refused_or_complete(corpus):
    format_1.rewrite_corpus(corpus.path)
    values, generator, refused = read_metadata(corpus), random.Random(0), 0
    for _ in range(300):
        write_metadata(corpus, damaged_values(values, generator), right_checksum=False)
        try:
            opened = Corpus.open(corpus.path)
            for split in SPLITS:
                assert opened.splits[split].num_tokens == opened.token_file(split).header.num_tokens
        except DataError as error:
            refused += 1
            assert str(corpus.path) in str(error)
    assert refused > 150


def test_format_1_is_read(corpus):
    format_1.rewrite_corpus(corpus.path)
    old = Corpus.open(corpus.path)
    assert old == dataclasses.replace(corpus, header_hashes=None)
    old.verify()
    flip(corpus.path / "train.bin", -1)
    with pytest.raises(DataError, match=r"train\.bin: its ids are not those that were written"):
        old.verify()


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("version", [1, 2])
def test_changed_ids(corpus, split, version):
    if version == 1:
        format_1.rewrite_corpus(corpus.path)
    flip(corpus.path / f"{split}.bin", HEADER_BYTES + 40)
    corpus = Corpus.open(corpus.path)
    found = rf"{split}\.bin: " + ("its ids" if version == 1 else r"block 0 of 1 \(bytes 8192 to \d+\)")
    with pytest.raises(DataError, match=found):
        corpus.verify()
    with pytest.raises(DataError, match=found):
        corpus.verify(max_bytes=TokenFile.open(corpus.path / f"{split}.bin").header.num_bytes)
    said = []
    corpus.verify(max_bytes=100, say=said.append)  # leaves large ones to the reading of blocks
    assert len(said) == (2 if version == 1 else 0)
    assert all("is of format 1, so that its ids are not checked" in message for message in said)


@pytest.mark.parametrize("version", [1, 2])
def test_swapped_splits(corpus, version):
    if version == 1:
        format_1.rewrite_corpus(corpus.path)
    (corpus.path / "train.bin").rename(corpus.path / "x")
    (corpus.path / "validation.bin").rename(corpus.path / "train.bin")
    (corpus.path / "x").rename(corpus.path / "validation.bin")
    opened = Corpus.open(corpus.path)
    for split, written in (("train", "validation"), ("validation", "train")):
        found = rf"{split}\.bin has num_tokens \d+, but" if version == 1 else f"was written as {written}.bin"
        with pytest.raises(DataError, match=found):
            opened.token_file(split)


def test_a_split_of_another_corpus(corpus, settings, tmp_path):
    """Of the same tokenizer and length."""
    other = prepare(settings, tmp_path / "other", num_workers=0, overwrite=False)
    writer = TokenFileWriter(other.path / "train.bin", ByteTokenizer())
    ids = other.token_file("validation").read(0, 10)
    writer.append(np.resize(ids, corpus.splits["train"].num_tokens), corpus.splits["train"].num_documents)
    writer.close()
    shutil.copy(other.path / "train.bin", corpus.path / "train.bin")
    TokenFile.open(corpus.path / "train.bin").verify()  # is sound
    with pytest.raises(DataError, match=r"train\.bin is not the file that .*metadata\.json describes"):
        Corpus.open(corpus.path).token_file("train")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eos_id": 10}, "has eos_id 10, but the tokenizer beside it 256"),
        ({"vocab_size": 300}, "has vocab_size 300, but the tokenizer beside it 257"),
        ({"tokenizer_hash": "0" * 64}, "was made by another tokenizer"),
    ],
)
def test_another_header(corpus, changes, message):
    set_header(corpus.path / "train.bin", **changes)
    with pytest.raises(DataError, match=rf"train\.bin ({message}|is not the file that)"):
        Corpus.open(corpus.path).token_file("train")
    format_1.rewrite_corpus(corpus.path)
    with pytest.raises(DataError, match=rf"train\.bin {message}"):
        Corpus.open(corpus.path).token_file("train")


def test_another_tokenizer(corpus):
    (corpus.path / "tokenizer_info.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer_info\.json is missing"):
        corpus.token_file("train")
    ByteTokenizer().save(corpus.path)
    corpus.token_file("train")
    values = read_metadata(corpus)
    write_metadata(corpus, values | {"tokenizer_hash": "0" * 64})
    other = Corpus.open(corpus.path)
    with pytest.raises(DataError, match="its tokenizer is not the one that made its tokens"):
        other.tokenizer()
    with pytest.raises(DataError, match=r"train\.bin was made by another tokenizer"):
        other.token_file("train")


def test_bits_per_byte_of_three_short_documents():
    statistics = Statistics(num_documents=3, num_tokens=36, num_bytes=33, byte_entropy_nats=None)
    assert statistics.num_targets == 33
    nats = 33 * 7.42 * math.log(2)  # 33 targets, 33 bytes
    assert statistics.bits_per_byte(nats / 33) == pytest.approx(7.42)


def test_bits_per_byte_is_not_known_without_bytes_or_of_a_part_of_the_text():
    statistics = Statistics(num_documents=3, num_tokens=36, num_bytes=33, byte_entropy_nats=None)
    assert statistics.bits_per_byte(1.0, first_target_id=5) is None
    assert dataclasses.replace(statistics, num_bytes=None).bits_per_byte(1.0) is None
    assert dataclasses.replace(statistics, num_tokens=3, num_bytes=0).bits_per_byte(1.0) is None


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:258"])
@pytest.mark.parametrize("seq_len", [7, 1000])
def test_the_targets_of_a_split_are_those_that_count(settings, tmp_path, tokenizer, seq_len):
    for name, texts in (("train", ["abab" * 9]), ("validation", ["a", "bab" * 3, "c" * 20, "abc"])):
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number}.txt").write_text(text)
    settings = dataclasses.replace(
        settings, source=(str(tmp_path / "train"),), validation_source=(str(tmp_path / "validation"),)
    )
    settings = dataclasses.replace(settings, tokenizer=tokenizer)
    corpus = prepare(settings, tmp_path / "corpus", num_workers=0, overwrite=False)
    statistics = corpus.splits["validation"]
    data = DataConfig(path=str(corpus.path), seq_len=seq_len, global_batch_size=2)
    batches = ValidationData(data, vocab_size=corpus.tokenizer().vocab_size)
    counted = sum(float(np.sum(batch.loss_weights)) for batch in batches)
    assert statistics.num_targets == counted
    assert statistics.num_bytes == 33
    assert statistics.bits_per_byte(1.0) == pytest.approx(counted / math.log(2) / 33)


def test_byte_entropy():
    assert byte_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4))
    assert byte_entropy(np.array([0, 7])) == 0
    assert byte_entropy(np.array([0])) == 0
