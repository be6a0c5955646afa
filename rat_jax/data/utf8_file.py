"""Files of text as a stream of UTF-8, whatever they are stored as; what is no text is refused by name.

Unpacked are `.gz`, `.bz2`, `.xz` and `.zst`. A byte order mark says UTF-8, UTF-16 or UTF-32 and is not text.
"""

import codecs
import contextlib
import importlib
import io
import pathlib
import stat
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Literal

from rat_jax.data import DataError
from rat_jax.files import explain

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

_BLOCK_BYTES = 1 << 20
_HEAD_BYTES = 8192  # in which a NUL shows that a file is no text
_BYTE_ORDER_MARKS = {  # UTF-32 first: its little-endian mark begins as that of UTF-16
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
    codecs.BOM_UTF8: "utf-8",
}
_MAGIC = {
    b"\x1f\x8b": "packed with gzip: give its name the ending .gz, and it is unpacked",
    b"\x28\xb5\x2f\xfd": "packed with zstd: give its name the ending .zst, and it is unpacked",
    b"\xfd7zXZ\0": "packed with xz: give its name the ending .xz, and it is unpacked",
    b"BZh": "packed with bzip2: give its name the ending .bz2, and it is unpacked",
    b"PK\x03\x04": "a zip archive: unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it",
    b"PAR1": "Parquet: give its name the ending .parquet, or name it as parquet:PATH",
    b"%PDF-": "a PDF: extract its text",
}
_LEAVE_OUT = "leave it out, for example by a pattern such as 'FOLDER/**/*.txt'"


def compression(path: pathlib.PurePath) -> str:
    """The ending of a file's name that says how it is compressed, in small letters; empty if it is not."""
    suffix = path.suffix.lower()
    return suffix if suffix in _COMPRESSIONS else ""


@contextlib.contextmanager
def open_utf8(path: pathlib.Path, invalid: Literal["refuse", "replace"]) -> Iterator[BinaryIO]:
    """The content of a file as a stream of UTF-8 without a byte order mark.

    Content that is UTF-8 already is not checked: `decode` does that. A file of UTF-16 or UTF-32 is, and `invalid` says
    what becomes of what no character stands for.

    Raises:
      DataError: naming the file: if it cannot be read, is damaged or no text, also while the stream is read.
    """
    errors = "strict" if invalid == "refuse" else "replace"
    try:
        with _unpacked(path) as file:
            yield io.BufferedReader(_Utf8Stream(path, file, errors), _BLOCK_BYTES)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not {error.encoding}, as its byte order mark says: {error.reason}; "
            f"--invalid_utf8 replace would write U+FFFD there and continue"
        ) from None
    except (EOFError, zlib.error, *_lzma_errors()) as error:
        raise DataError(f"{path} cannot be read: it is damaged or cut short: {error}") from None
    except OSError as error:
        damaged = "it is damaged or cut short: " if error.errno is None else ""
        raise DataError(f"{path} cannot be read: {damaged}{explain(error)}") from None


def decode(content: bytes, name: str, invalid: Literal["refuse", "replace"]) -> str:
    """The text of UTF-8.

    Args:
      content: bytes.
      name: of the file, and of the place in it, for messages.
      invalid: what becomes of bytes that are no UTF-8.

    Raises:
      DataError: naming the byte that is no UTF-8.
    """
    return BlockDecoder(invalid).decode(content, name, final=True)


class BlockDecoder:
    """Decodes UTF-8 that comes in blocks, which may end inside a character."""

    def __init__(self, invalid: Literal["refuse", "replace"]):
        self._decoder = codecs.getincrementaldecoder("utf-8")("strict" if invalid == "refuse" else "replace")
        self._start = 0  # of the next block, in bytes

    def decode(self, block: bytes, name: str, *, final: bool) -> str:
        """The text of the next block; arguments and errors as of `decode`."""
        start = self._start - len(self._decoder.getstate()[0])
        self._start += len(block)
        try:
            return self._decoder.decode(block, final)
        except UnicodeDecodeError as error:
            raise _not_utf8(error, name, start) from None


def _not_utf8(error: UnicodeDecodeError, name: str, start: int) -> DataError:
    head = error.object[:_HEAD_BYTES]
    num_control = sum(byte < 32 and byte not in b"\t\n\r\f\b\x1b" for byte in head)
    if b"\0" in error.object or num_control > len(head) / 50:
        return DataError(f"{name} is binary, not text: {_LEAVE_OUT}")
    return DataError(
        f"{name} is not UTF-8 at byte {start + error.start} (0x{error.object[error.start]:02x}); "
        f"--invalid_utf8 replace would write U+FFFD there and continue"
    )


class _Utf8Stream(io.RawIOBase):
    """Reads a file, which begins with text, and writes its encoding anew."""

    def __init__(self, path: pathlib.Path, file: BinaryIO, errors: str):
        self._file = file
        self._ready = memoryview(b"")
        head = _read_full(file, _HEAD_BYTES)
        if not head and compression(path):
            raise EOFError("it is empty")
        mark, encoding = next(((m, e) for m, e in _BYTE_ORDER_MARKS.items() if head.startswith(m)), (b"", "utf-8"))
        self._first = head.removeprefix(mark)
        self._decoder = None if encoding == "utf-8" else codecs.getincrementaldecoder(encoding)(errors)
        readable = self._first if self._decoder is None else self._first.decode(encoding, "ignore").encode()
        _check_is_text(path, readable)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        at_end = False
        while not self._ready and not at_end:
            block, self._first = self._first or self._file.read(_BLOCK_BYTES), b""
            at_end = not block
            if self._decoder is not None:
                block = self._decoder.decode(block, final=at_end).encode()
            self._ready = memoryview(block)
        size = min(len(buffer), len(self._ready))
        buffer[:size], self._ready = self._ready[:size], self._ready[size:]
        return size


def _check_is_text(path: pathlib.Path, head: bytes) -> None:
    for magic, what in _MAGIC.items():
        if head.startswith(magic) and (b"\0" in head or not magic.isalnum() or not _is_utf8(head)):
            raise DataError(f"{path} is binary, not text; it is {what}, or {_LEAVE_OUT}")
    if head[257:262] == b"ustar":
        raise DataError(f"{path} is binary, not text; it is a tar archive: unpack it, or {_LEAVE_OUT}")
    if b"\0" in head:
        raise DataError(
            f"{path} is binary, not text (byte {head.index(0)} is NUL): {_LEAVE_OUT}; text in UTF-16 or UTF-32 needs "
            f"its byte order mark"
        )


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)  # the end may be a part of a character
    except UnicodeDecodeError:
        return False
    return True


def _unpacked(path: pathlib.Path) -> BinaryIO:
    """The file, opened, its compression undone."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise DataError(f"{path} is no file that can be read twice (a pipe or a device): write its content to a file")
    match compression(path):
        case ".gz":
            return _module("gzip", path).open(path)
        case ".bz2":
            return _module("bz2", path).open(path)
        case ".xz":
            return _module("lzma", path).open(path)
        case ".zst":
            return _open_zstd(path)
    return path.open("rb")


def _module(name: str, path: pathlib.Path):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise DataError(f"{path} cannot be unpacked: this Python was built without {name} ({error})") from None


def _lzma_errors() -> tuple[type[Exception], ...]:
    try:
        import lzma
    except ImportError:
        return ()
    return (lzma.LZMAError,)


def _open_zstd(path: pathlib.Path) -> BinaryIO:
    import pyarrow

    if not pyarrow.Codec.is_available("zstd"):
        raise DataError(f"{path} cannot be unpacked: this pyarrow was built without zstd; unpack it first")
    return pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd")


def _read_full(file: BinaryIO, size: int) -> bytes:
    """`size` bytes, or all that there are."""
    parts: list[bytes] = []
    while size and (part := file.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
