import pickle

import numpy as np
import pytest

from rat_jax.data import DataError
from rat_jax.data.integrity import BLOCK_BYTES, DIGEST_BYTES
from rat_jax.data.token_file import TokenFile, TokenFileWriter, wrap_flat_file
from rat_jax.data.token_header import HEADER_BYTES
from rat_jax.data.tokenizer import IdTokenizer
from tests.data import format_1

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
    assert file.tokens.dtype == dtype
    assert file.tokens.tolist() == file.read(0, 7).tolist() == ids
    assert file.read(2, 5).tolist() == ids[2:5]
    assert file.read(5, 100).tolist() == ids[5:]
    assert file.read(0, 7).dtype == dtype
    assert file.read(7, 9).size == 0
    file.verify()
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda content: content.pop(),
            r"x\.bin has 8215 bytes, but .* promises 4 tokens, 8216 bytes",
        ),
        (lambda content: content.append(0), r"x\.bin has 8217 bytes"),
        (
            lambda content: content.__delitem__(slice(100, None)),
            r"header of .*x\.bin is damaged: .* after 100 bytes",
        ),
        (lambda content: content.clear(), "is not a token file"),
    ],
)
def test_files_of_another_size(tmp_path, change, message):
    path = tmp_path / "x.bin"
    write(path, [3, 4, 5, 2])
    damage(path, change)
    with pytest.raises(DataError, match=message):
        TokenFile.open(path)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("block", [0, 1, 2])
def test_one_changed_bit_is_found_with_its_block(tmp_path, wrapped, block):
    tokens = BLOCK_BYTES // 2  # of a block
    path, ids = tmp_path / "x.bin", np.random.default_rng(0).integers(3, 1000, 2 * tokens + 100).astype("<u2")
    if wrapped:
        changed, start = tmp_path / "flat.bin", 0
        ids.tofile(changed)
        wrap_flat_file(path, changed, TOKENIZER, lambda _: None)
    else:
        changed, start = path, HEADER_BYTES
        write(path, ids)
    TokenFile.open(path).verify()
    content = bytearray(changed.read_bytes())
    content[start + block * BLOCK_BYTES + 77] ^= 2
    changed.write_bytes(content)
    file = TokenFile.open(path)
    message = rf"{changed}: block {block} of 3 \(bytes {start + block * BLOCK_BYTES} to \d+\) is not what was written"
    with pytest.raises(DataError, match=message):
        file.verify()
    other = (block + 1) % 3
    np.testing.assert_array_equal(file.read(other * tokens, other * tokens + 50), ids[other * tokens :][:50])
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            file.read(block * tokens + 60, block * tokens + 62)  # of the block, not the changed id


def test_changed_digests(tmp_path):
    write(tmp_path / "x.bin", [3, 4, 5, 2])
    damage(tmp_path / "x.bin", lambda content: content.__setitem__(-1, content[-1] ^ 1))
    with pytest.raises(DataError, match=r"x\.bin: the digests of its blocks \(bytes 8200 and later\)"):
        TokenFile.open(tmp_path / "x.bin").read(0, 1)


def test_format_1(tmp_path):
    """Nothing but the whole can be checked, and that it is not changed while it is read."""
    path, ids = tmp_path / "x.bin", list(range(3, 900)) * 100
    header = write(path, ids)
    format_1.rewrite_token_file(path)
    file = TokenFile.open(path)
    assert file.header.content_hash == header.content_hash
    assert file.read(5, 9).tolist() == ids[5:9]
    file.verify()
    path.chmod(0o600)
    assert file.read(5, 9).tolist() == ids[5:9]
    damage(path, lambda content: content.__setitem__(-1, content[-1] ^ 1))
    with pytest.raises(DataError, match=r"x\.bin was changed while it was in use"):
        file.read(5, 9)
    with pytest.raises(DataError, match=r"x\.bin: its ids are not those that were written"):
        TokenFile.open(path).verify()


def test_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"gone\.bin cannot be read: No such file"):
        TokenFile.open(tmp_path / "gone.bin")


def test_a_file_that_fails_half_way_is_closed(tmp_path):
    with pytest.raises(KeyError), TokenFileWriter(tmp_path / "train.bin", TOKENIZER) as writer:
        raise KeyError
    assert writer._file.closed
    with TokenFileWriter(tmp_path / "train.bin", TOKENIZER) as writer:
        writer.append(np.arange(3), 1)
        writer.close()
    assert len(TokenFile.open(tmp_path / "train.bin")) == 3


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
    assert file.tokens.tolist() == file.read(0, len(ids)).tolist() == ids
    file.verify()
    assert header.num_documents == num_documents
    assert header.content_hash == write(tmp_path / "copy.bin", ids).content_hash
    assert sum(seen) == len(ids)
    assert (tmp_path / "x.bin").stat().st_size == HEADER_BYTES + DIGEST_BYTES  # no id was copied
    flat.write_bytes(flat.read_bytes() + b"\x05\x00")
    message = r"flat\.bin, which .*x\.bin points to, has \d+ bytes, but the header of .*x\.bin promises"
    with pytest.raises(DataError, match=message):
        TokenFile.open(tmp_path / "x.bin")
    flat.unlink()
    with pytest.raises(DataError, match=r"flat\.bin, which .*x\.bin points to, cannot be read: No such file"):
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
