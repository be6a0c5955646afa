import json
import pickle

import numpy as np
import pytest

from rat_jax.data import DataError
from rat_jax.data.token_file import HEADER_BYTES, TokenFile, TokenFileWriter, wrap_flat_file
from rat_jax.data.tokenizer import IdTokenizer

TOKENIZER = IdTokenizer(vocab_size=1000, eos_id=2)


def write(path, ids, tokenizer=TOKENIZER):
    writer = TokenFileWriter(path, tokenizer)
    half = len(ids) // 2
    writer.append(np.asarray(ids[:half]), 1)
    writer.append(np.asarray(ids[half:]), 2)
    return writer.close()


@pytest.mark.parametrize(("vocab_size", "dtype"), [(1000, "uint16"), (65536, "uint16"), (65537, "uint32")])
def test_round_trip(tmp_path, vocab_size, dtype):
    tokenizer = IdTokenizer(vocab_size, 2)
    ids = [3, 4, 2, 5, 2, vocab_size - 1, 2]
    header = write(tmp_path / "x.bin", ids, tokenizer)
    file = TokenFile.open(tmp_path / "x.bin")
    assert file.header == header
    assert (header.dtype, header.vocab_size, header.eos_id) == (dtype, vocab_size, 2)
    assert (header.num_tokens, header.num_documents, header.tokenizer_hash) == (7, 3, tokenizer.hash)
    assert isinstance(file.tokens, np.memmap)
    assert file.tokens.dtype == dtype
    assert file.tokens.tolist() == ids
    assert len(file) == 7
    with pytest.raises(ValueError, match="read-only"):
        file.tokens[0] = 1


def test_content_hash_is_of_the_ids(tmp_path):
    hashes = [write(tmp_path / "x.bin", ids).content_hash for ids in ([3, 4, 5, 2], [3, 4, 5, 2], [3, 5, 4, 2])]
    assert hashes[0] == hashes[1] != hashes[2]


def test_pickles_as_its_path(tmp_path):
    write(tmp_path / "x.bin", list(range(3, 900)) * 100)
    file = TokenFile.open(tmp_path / "x.bin")
    assert len(file.tokens) == 89700
    content = pickle.dumps(file)
    assert len(content) < 1000
    assert pickle.loads(content).tokens.tolist() == file.tokens.tolist()


def damage(path, change):
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)


def set_field(**changes):
    def change(content):
        fields = json.loads(content[12:HEADER_BYTES]) | changes
        content[12:HEADER_BYTES] = json.dumps(fields).encode().ljust(HEADER_BYTES - 12)

    return change


def overwrite(start, new):
    def change(content):
        content[start : start + len(new)] = new

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (overwrite(0, b"X"), r"x\.bin is not a token file: .* --source release-bin:"),
        (overwrite(8, b"\x07"), r"x\.bin has format version 7; this code reads version 1"),
        (overwrite(12, b"?"), r"the header of .*x\.bin is damaged"),
        (set_field(dtype="int8"), r"the header of .*x\.bin is damaged: dtype 'int8'"),
        (set_field(color="red"), r"the header of .*x\.bin is damaged: .*color"),
        (set_field(num_tokens=5), r"x\.bin has 8200 bytes, but the header of .* promises 5 tokens, 8202 bytes"),
        (
            lambda content: content.pop(),
            r"x\.bin has 8199 bytes, but .* promises 4 tokens, 8200 bytes: the file was cut",
        ),
        (lambda content: content.append(0), r"x\.bin has 8201 bytes"),
        (lambda content: content.__delitem__(slice(100, None)), r"the header of .*x\.bin is damaged"),
        (lambda content: content.clear(), "is not a token file"),
        (set_field(data_file="/nowhere/flat.bin"), r"/nowhere/flat\.bin, which .*x\.bin points to, cannot be read"),
    ],
)
def test_damaged_files(tmp_path, change, message):
    path = tmp_path / "x.bin"
    write(path, [3, 4, 5, 2])
    damage(path, change)
    with pytest.raises(DataError, match=message):
        TokenFile.open(path)


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"gone\.bin cannot be read: No such file"):
        TokenFile.open(tmp_path / "gone.bin")


def test_unfinished_file(tmp_path):
    writer = TokenFileWriter(tmp_path / "x.bin", TOKENIZER)
    writer.append(np.arange(3, 900), 1)
    with pytest.raises(DataError, match="is not a token file"):
        TokenFile.open(tmp_path / "x.bin")
    writer.close()
    assert len(TokenFile.open(tmp_path / "x.bin")) == 897


@pytest.mark.parametrize(("ids", "num_documents"), [([5, 6, 2, 7, 2], 2), ([5, 6, 2, 7], 2), ([5], 1), ([2, 2], 2)])
def test_flat_file(tmp_path, ids, num_documents):
    flat = tmp_path / "flat.bin"
    np.asarray(ids, "<u2").tofile(flat)
    seen = []
    header = wrap_flat_file(tmp_path / "x.bin", flat, TOKENIZER, seen.append)
    file = TokenFile.open(tmp_path / "x.bin")
    assert file.header == header
    assert file.tokens.tolist() == ids
    assert header.num_documents == num_documents
    assert header.content_hash == write(tmp_path / "copy.bin", ids).content_hash
    assert sum(seen) == len(ids)
    assert (tmp_path / "x.bin").stat().st_size == HEADER_BYTES  # nothing was copied
    flat.write_bytes(flat.read_bytes() + b"\x05\x00")
    with pytest.raises(DataError, match=r"flat\.bin has \d+ bytes, but the header of .*x\.bin promises"):
        TokenFile.open(tmp_path / "x.bin")


def test_flat_files_that_cannot_be_used(tmp_path, monkeypatch):
    monkeypatch.setattr("rat_jax.data.token_file._BLOCK_TOKENS", 2)
    flat = tmp_path / "flat.bin"

    def wrap(tokenizer=TOKENIZER):
        wrap_flat_file(tmp_path / "x.bin", flat, tokenizer, lambda _: None)

    with pytest.raises(DataError, match=r"flat\.bin cannot be read: No such file"):
        wrap()
    for content in (b"", b"abc"):
        flat.write_bytes(content)
        with pytest.raises(DataError, match=f"has {len(content)} bytes, which is not a whole, positive number"):
            wrap()
    np.asarray([5, 6, 2, 1000], "<u2").tofile(flat)
    with pytest.raises(DataError, match=r"flat\.bin: token id 1000 at position 3 is outside the vocabulary of 1000"):
        wrap()
    with pytest.raises(DataError, match="vocabulary of 70000 do not fit the uint16"):
        wrap(IdTokenizer(70000, 2))
    assert not (tmp_path / "x.bin").exists()
