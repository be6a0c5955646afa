"""Files of every kind, mutated at random: each is read, or refused in one line that names it."""

import bz2
import codecs
import gzip
import io
import json
import lzma
import random

import pyarrow
import pyarrow.parquet
import pytest

from rat_jax.data.document import ReadOptions
from rat_jax.data.sources import parse_source
from rat_jax.errors import RatJaxError

TEXTS = ["one", "zwei € 🦊\r\n" * 20, "x" * 300, ""]
SPLICES = (
    *(b"\0", b"[", b"]", b",", b"{", b"}", b'"', b"\\", b"\r", b"\\ud800", b"\\u0000", b"null", b"NaN", b"1e999"),
    *(b"9" * 5000, b"[" * 3000, codecs.BOM_UTF8, codecs.BOM_UTF16_LE),
)
MARKS = (b"", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_LE)


def parquet() -> bytes:
    table = pyarrow.table({"text": TEXTS, "meta": [{"text": text} for text in TEXTS]})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file)
    return file.getvalue()


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


RECORDS = [json.dumps({"text": text, "meta": {"text": text}, "n": 1.5}) for text in TEXTS]
CONTENTS = {
    ".txt": "\n\n".join(TEXTS).encode(),
    ".jsonl": "\n".join(RECORDS).encode(),
    ".json": f"[{','.join(RECORDS)}]".encode(),
    ".parquet": parquet(),
}
PACKINGS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


def mutated(content: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(content) + 1)
    before, after = content[:place], content[place:]
    match draw.randrange(6):
        case 0 if after:
            return before + bytes([after[0] ^ 1 << draw.randrange(8)]) + after[1:]
        case 1:
            return before
        case 2:
            return before + draw.randbytes(draw.randrange(1, 9)) + after
        case 3:
            return before + after[draw.randrange(20) :]
        case 4:
            return before + draw.choice(SPLICES) + after
        case 5:
            return draw.choice(MARKS) + content
    return content


@pytest.mark.parametrize("seed", range(4))
def test_mutated_files(tmp_path, seed):
    draw = random.Random(seed)
    num_read = 0
    for number in range(100):
        kind, packing = draw.choice(list(CONTENTS)), draw.choice(["", "", *PACKINGS])
        content = CONTENTS[kind]
        if draw.random() < 0.2 and kind != ".parquet":
            content = content.decode().encode(draw.choice(["utf-16", "utf-32", "utf-16-le", "latin-1"]), "replace")
        if draw.random() < 0.4:
            content = mutated(PACKINGS[packing](content), draw)
        else:
            content = PACKINGS[packing](mutated(content, draw))
        path = tmp_path / f"{number}{draw.choice([kind + packing] * 8 + list(CONTENTS))}"
        path.write_bytes(content)
        options = ReadOptions(
            field=draw.choice(["text", "meta.text", "gone"]),
            document_separator=draw.choice([None, "\n\n", "|"]),
            invalid_utf8=draw.choice(["refuse", "replace"]),
        )
        try:
            source = parse_source(str(path), options)
            source.check()
            for document in source.documents():
                document.text.encode()  # no halves of a pair
            num_read += 1
        except RatJaxError as error:
            assert path.name in str(error), f"seed {seed}, file {number}"
            assert str(error).isprintable(), f"seed {seed}, file {number}"
        path.unlink()
    assert num_read > 10
