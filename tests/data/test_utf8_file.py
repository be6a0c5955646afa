import bz2
import codecs
import gzip
import lzma
import os
import sys
import zipfile

import pyarrow
import pytest

from rat_jax.data import DataError
from rat_jax.data.utf8_file import BlockDecoder, decode, open_utf8

TEXT = "naïve café €, 🦊\r\n" * 300


def content(path, invalid="refuse") -> bytes:
    with open_utf8(path, invalid) as stream:
        return stream.read()


def zstd(data: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize(
    ("mark", "encoding"),
    [
        (b"", "utf-8"),
        (codecs.BOM_UTF8, "utf-8"),
        (codecs.BOM_UTF16_LE, "utf-16-le"),
        (codecs.BOM_UTF16_BE, "utf-16-be"),
        (codecs.BOM_UTF32_LE, "utf-32-le"),
        (codecs.BOM_UTF32_BE, "utf-32-be"),
    ],
)
@pytest.mark.parametrize("suffix", [".txt", *PACKED])
@pytest.mark.parametrize("block", [1, 1 << 20])
def test_encodings_and_compressions(tmp_path, monkeypatch, mark, encoding, suffix, block):
    monkeypatch.setattr("rat_jax.data.utf8_file._BLOCK_BYTES", block)
    path = tmp_path / f"x{suffix}"
    path.write_bytes(PACKED.get(suffix, bytes)(mark + TEXT.encode(encoding)))
    assert content(path).decode() == TEXT
    with open_utf8(path, "refuse") as stream:
        assert [line.decode() for line in stream] == TEXT.splitlines(keepends=True)


def test_ending_in_capitals(tmp_path):
    (tmp_path / "X.TXT.GZ").write_bytes(gzip.compress(b"text"))
    assert content(tmp_path / "X.TXT.GZ") == b"text"


@pytest.mark.parametrize("suffix", PACKED)
def test_several_parts(tmp_path, suffix):
    """Compressed files that were put together are one."""
    path = tmp_path / f"x{suffix}"
    path.write_bytes(PACKED[suffix](b"one ") + PACKED[suffix](b"two"))
    assert content(path) == b"one two"


DAMAGES = ("empty", "cut", "changed", "text", "another")


@pytest.mark.parametrize(
    ("suffix", "damage"),  # a change of zstd shows only by a checksum, which pyarrow does not write
    [(suffix, damage) for suffix in PACKED for damage in DAMAGES if (suffix, damage) != (".zst", "changed")],
)
def test_damaged_compressed_files(tmp_path, suffix, damage):
    packed = PACKED[suffix](os.urandom(3000).hex().encode())
    path = tmp_path / f"x.txt{suffix}"
    middle = len(packed) // 2
    path.write_bytes(
        {
            "empty": b"",
            "cut": packed[:-20],
            "changed": packed[:middle] + bytes([packed[middle] ^ 255]) + packed[middle + 1 :],
            "text": b"plain text of some length",
            "another": (zstd if suffix == ".gz" else gzip.compress)(b"text"),
        }[damage]
    )
    with pytest.raises(DataError, match=rf"x\.txt\{suffix} cannot be read: it is damaged or cut short: .+"):
        content(path)


@pytest.mark.parametrize("invalid", ["refuse", "replace"])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", r"\(byte 8 is NUL\): leave it out, for example by"),
        (TEXT.encode("utf-16-le"), "text in UTF-16 or UTF-32 needs its byte order mark"),
        (codecs.BOM_UTF16_LE + bytes(100), "is NUL"),
        (gzip.compress(b"x"), "packed with gzip: give its name the ending .gz, and it is unpacked, or leave it out"),
        (bz2.compress(b"x"), "packed with bzip2"),
        (lzma.compress(b"x"), "packed with xz"),
        (zstd(b"x"), "packed with zstd"),
        (b"PAR1\x15\x04\0", "it is Parquet: give its name the ending .parquet"),
        (b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "it is a PDF: extract its text"),
        (bytes(257) + b"ustar", "it is a tar archive: unpack it"),
    ],
)
def test_binary_files(tmp_path, data, message, invalid):
    (tmp_path / "x.txt").write_bytes(data)
    with pytest.raises(DataError, match=rf"x\.txt is binary, not text.*{message}") as failure:
        content(tmp_path / "x.txt", invalid)
    assert "--invalid_utf8" not in str(failure.value)


def test_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(DataError, match="a zip archive: unpack it"):
        content(tmp_path / "x")


def test_text_that_begins_as_a_format_does(tmp_path):
    for text in ("BZh, a river", "PAR1 é"):
        (tmp_path / "x").write_text(text)
        assert content(tmp_path / "x").decode() == text


def test_invalid_utf16(tmp_path):
    (tmp_path / "x").write_bytes(codecs.BOM_UTF16_LE + "fine".encode("utf-16-le") + b"\x00\xd8")
    with pytest.raises(DataError, match=r"x is not utf-16-le, as its byte order mark says: .*--invalid_utf8 replace"):
        content(tmp_path / "x")
    assert content(tmp_path / "x", "replace").decode() == "fine\ufffd"


def test_what_cannot_be_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="pipe is no file that can be read twice"):
        content(tmp_path / "pipe")
    with pytest.raises(DataError, match="gone cannot be read: No such file"):
        content(tmp_path / "gone")


def test_python_without_a_compression(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bz2", None)  # import then fails
    (tmp_path / "x.bz2").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.bz2 cannot be unpacked: this Python was built without bz2"):
        content(tmp_path / "x.bz2")


def test_decode():
    assert decode("é".encode(), "x", "refuse") == "é"
    assert decode(b"a\xff", "x", "replace") == "a\ufffd"
    with pytest.raises(DataError, match=r"x is not UTF-8 at byte 1 \(0xff\); --invalid_utf8 replace"):
        decode(b"a\xff", "x", "refuse")
    with pytest.raises(DataError, match="x is binary, not text"):
        decode(b"\1\2\3\4\5\x8f\x9a", "x", "refuse")


def test_position_in_blocks():
    decoder = BlockDecoder("refuse")
    assert decoder.decode(b"ab\xe2\x82", "x", final=False) == "ab"
    assert decoder.decode(b"\xac", "x", final=False) == "€"
    assert decoder.decode(b"c\xe2", "x", final=False) == "c"
    with pytest.raises(DataError, match=r"at byte 6 \(0xe2\)"):
        decoder.decode(b"d", "x", final=True)
