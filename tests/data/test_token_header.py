import dataclasses
import hashlib
import json
import pathlib
import random

import pytest

from rat_jax.data import DataError
from rat_jax.data.integrity import BLOCK_BYTES
from rat_jax.data.token_header import FORMAT_VERSION, HEADER_BYTES, MAGIC, Header
from tests.data.damage import damaged, damaged_values

PATH = pathlib.Path("train.bin")
HASH = hashlib.sha256(b"").hexdigest()
HEADER = Header(
    dtype="uint16",
    vocab_size=1000,
    eos_id=2,
    num_tokens=70,
    num_documents=3,
    tokenizer_hash=HASH,
    content_hash=HASH,
    data_file=None,
    name="train.bin",
    block_bytes=BLOCK_BYTES,
    digests_hash=HASH,
)
FORMAT_1 = dataclasses.replace(HEADER, name=None, block_bytes=None, digests_hash=None)


def content(fields: dict | str, version: int = FORMAT_VERSION) -> bytes:
    """A header with these fields, whose checksum is right."""
    text = (fields if isinstance(fields, str) else json.dumps(fields)).encode()
    start = MAGIC + version.to_bytes(4, "little")
    if version == 1:
        return (start + text).ljust(HEADER_BYTES)
    text = text.ljust(HEADER_BYTES - 44)
    return start + hashlib.sha256(text).digest() + text


def test_round_trip():
    for header in (HEADER, dataclasses.replace(HEADER, data_file="/data/flat ü.bin")):
        assert len(header.to_bytes()) == HEADER_BYTES
        assert Header.from_bytes(header.to_bytes(), PATH) == header
    assert HEADER.to_bytes() == content(dataclasses.asdict(HEADER))
    assert HEADER.num_bytes == 140
    with pytest.raises(DataError, match="too long for a token file's header"):
        dataclasses.replace(HEADER, data_file="/" + "x" * HEADER_BYTES).to_bytes()


def test_format_1_is_read():
    fields = {name: value for name, value in dataclasses.asdict(FORMAT_1).items() if value is not None}
    assert Header.from_bytes(content(fields | {"data_file": None}, 1), PATH) == FORMAT_1


@pytest.mark.parametrize(
    ("start", "new", "message"),
    [
        (0, b"X", r"train\.bin is not a token file: .* --source release-bin:"),
        (8, b"\x07", r"train\.bin has format version 7; this code reads versions 1 and 2"),
        (8, b"\x01", r"the header of train\.bin is damaged"),
        (12, b"?", r"the header of train\.bin is damaged: its checksum is another one"),
        (HEADER_BYTES - 1, b"?", r"the header of train\.bin is damaged: its checksum is another one"),
    ],
)
def test_damaged_bytes(start, new, message):
    changed = bytearray(HEADER.to_bytes())
    changed[start : start + 1] = new
    with pytest.raises(DataError, match=message):
        Header.from_bytes(bytes(changed), PATH)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int8"}, "dtype 'int8' is neither uint16 nor uint32"),
        ({"dtype": "uint32"}, "dtype is uint32 for a vocabulary of 1000"),
        ({"dtype": 3}, "dtype must be text, got 3"),
        ({"color": "red"}, "unknown field 'color'"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"vocab_size": True}, "vocab_size must be a whole number, got True"),
        ({"eos_id": 1000}, "eos_id 1000 is outside the vocabulary"),
        ({"num_tokens": -1}, "num_tokens is -1"),
        ({"num_tokens": 70.0}, r"num_tokens must be a whole number, got 70\.0"),
        ({"num_documents": 71}, "num_documents is 71"),
        ({"content_hash": HASH[:-1]}, "content_hash is no SHA-256"),
        ({"data_file": "flat.bin"}, "data_file 'flat.bin' is no absolute path"),
        ({"data_file": "/a\0b"}, "is no absolute path"),
        ({"data_file": "/\ud800"}, "is no absolute path"),
        ({"row_tokens": 69}, "row_tokens is 69"),
        ({"packed_row_tokens": 69}, "packed_row_tokens is 69"),
        ({"packed_row_tokens": 0}, "packed_row_tokens is 0"),
        ({"packed_row_tokens": 10, "row_tokens": 10}, "packed_row_tokens is 10"),
        ({"packed_row_tokens": 10, "data_file": "/a"}, "packed_row_tokens is 10"),
        ({"block_bytes": 4}, "block_bytes is 4, not 65536"),
        ({"digests_hash": None}, "a field of its format is missing"),
    ],
)
def test_values_that_cannot_be(changes, message):
    with pytest.raises(DataError, match=rf"the header of train\.bin is damaged: .*{message}"):
        Header.from_bytes(content(dataclasses.asdict(HEADER) | changes), PATH)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 4000, '{"vocab_size": ' + "9" * 5000 + "}", '"\\ud800"'])
def test_what_is_no_object(text):
    with pytest.raises(DataError, match=r"the header of train\.bin is damaged"):
        Header.from_bytes(content(text), PATH)


def test_any_damage_is_refused():
    generator = random.Random(0)
    for _ in range(300):
        with pytest.raises(DataError):
            Header.from_bytes(damaged(HEADER.to_bytes(), generator), PATH)


@pytest.mark.parametrize("version", [1, 2])
def test_damage_under_a_right_checksum_is_refused_or_a_header(version):
    generator = random.Random(version)
    header = HEADER if version == 2 else FORMAT_1
    fields = {name: value for name, value in dataclasses.asdict(header).items() if value is not None} | {
        "data_file": None
    }
    refused = 0
    for _ in range(300):
        values = damaged_values(fields, generator)
        try:
            header = Header.from_bytes(content(values, version), PATH)
        except DataError as error:
            refused += 1
            assert str(PATH) in str(error)
        else:
            assert {name: value for name, value in dataclasses.asdict(header).items() if name in values} == values
    assert refused > 150
