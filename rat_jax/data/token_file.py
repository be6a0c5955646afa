"""Token files: ids of one split in one flat file.

  bytes 0 .. 8191    the header (`rat_jax.data.token_header`)
  bytes 8192 ..      the ids, uint16 or uint32, little endian, each document followed by the end-of-document id;
                     or rows of examples (`rat_jax.data.row`) or of whole documents (`rat_jax.data.packed_rows`), one
                     after the other
  then               the digests of the blocks of the ids (`rat_jax.data.integrity`)

A header may point to a flat file without a header instead (the PyTorch release's `.bin`): `data_file`, never copied.
The digests then follow the header. Files of format 1, which are still read, have none: only their content as a whole
can be checked.
"""

import contextlib
import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import BinaryIO

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.answer_mask import MaskedIds
from rat_jax.data.integrity import BLOCK_BYTES, BlockHasher, CheckedReader, digests_size
from rat_jax.data.row import ADDED_BYTES, Row
from rat_jax.data.token_header import HEADER_BYTES, Header
from rat_jax.data.tokenizer import Tokenizer, token_dtype
from rat_jax.files import explain, system_errors

_BLOCK_TOKENS = 1 << 24


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A token file, open for reading. Reader processes get its path and header alone, and open it themselves."""

    path: pathlib.Path
    header: Header
    header_hash: str  # SHA-256 of the header as stored

    @classmethod
    def open(cls, path: pathlib.Path | str) -> "TokenFile":
        """Reads the header and checks that all tokens are there.

        Raises:
          DataError: not a token file, a damaged header, or a size that is not the promised one.
        """
        path = pathlib.Path(path)
        try:
            with path.open("rb") as file:
                content = file.read(HEADER_BYTES)
        except OSError as error:
            raise DataError(f"token file {path} cannot be read: {explain(error)}") from None
        file = cls(path, Header.from_bytes(content, path), hashlib.sha256(content).hexdigest())
        header = file.header
        after = 0 if header.digests_hash is None else digests_size(header.num_bytes)
        if header.data_file is None:
            file._check_size(path, HEADER_BYTES + header.num_bytes + after)
        else:
            file._check_size(path, HEADER_BYTES + after)
            file._check_size(pathlib.Path(header.data_file), header.num_bytes)
        return file

    def _check_size(self, path: pathlib.Path, expected: int) -> None:
        pointed = "" if path == self.path else f", which {self.path} points to,"
        try:
            size = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}{pointed} cannot be read: {explain(error)}") from None
        if size != expected:
            raise DataError(
                f"{path}{pointed} has {size} bytes, but the header of {self.path} promises "
                f"{self.header.num_tokens} tokens, {expected} bytes: the file was cut short or changed; restore it, or "
                f"prepare it again"
            )

    def __len__(self) -> int:
        return self.header.num_tokens

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def read(self, start: int, stop: int) -> np.ndarray:
        """Ids `start` .. `stop` - 1, fewer at the file's end, in its dtype and checked against the digests.

        Raises:
          DataError: if they are not the ids that were written, naming file and block. Files of format 1 are checked
            for changes since they were opened alone.
        """
        dtype = np.dtype(self.header.dtype).newbyteorder("<")
        start, stop = min(start, len(self)), min(stop, len(self))
        return np.frombuffer(self._reader.read(start * dtype.itemsize, stop * dtype.itemsize), dtype)

    def read_row(self, index: int) -> Row:
        """A row of a file of examples, checked; errors as of `read`."""
        dtype = np.dtype(self.header.dtype).newbyteorder("<")
        size = self._row_bytes
        return Row.from_bytes(self._reader.read(index * size, (index + 1) * size), dtype)

    def read_ahead(self, start: int, stop: int) -> None:
        """Has the system read ids that will be asked for soon; see `CheckedReader.read_ahead`."""
        size = np.dtype(self.header.dtype).itemsize
        self._reader.read_ahead(start * size, min(stop, len(self)) * size)

    def read_row_ahead(self, index: int) -> None:
        """As `read_ahead`, of a row of a file of examples."""
        self._reader.read_ahead(index * self._row_bytes, (index + 1) * self._row_bytes)

    @property
    def _row_bytes(self) -> int:
        return self.header.row_tokens * (np.dtype(self.header.dtype).itemsize + ADDED_BYTES)

    def verify(self, progress: Callable[[int], None] = lambda num_bytes: None) -> None:
        """Reads all ids and compares them with the digests, or in format 1 with the content's hash.

        Args:
          progress: called with the number of bytes of each piece.

        Raises:
          DataError: if they are not those that were written, naming the file, and the block where there are digests.
        """
        if self.header.digests_hash is not None:
            self._reader.check_all(progress)
            return
        digest = hashlib.sha256()
        for piece in self._reader.pieces():
            digest.update(piece)
            progress(len(piece))
        if digest.hexdigest() != self.header.content_hash:
            raise DataError(
                f"{self._data_path}: its ids are not those that were written: the file was changed, or its disk "
                f"fails; restore it, or prepare it again"
            )

    @property
    def _data_path(self) -> pathlib.Path:
        return self.path if self.header.data_file is None else pathlib.Path(self.header.data_file)

    @property
    def _ids_start(self) -> int:
        return HEADER_BYTES if self.header.data_file is None else 0

    @functools.cached_property
    def _reader(self) -> CheckedReader:
        return CheckedReader(self._data_path, self._ids_start, self.header.num_bytes, self._digests())

    def _digests(self) -> bytes | None:
        if self.header.digests_hash is None:
            return None
        start = HEADER_BYTES + (self.header.num_bytes if self.header.data_file is None else 0)
        try:
            with self.path.open("rb") as file:
                file.seek(start)
                digests = file.read(digests_size(self.header.num_bytes))
        except OSError as error:
            raise DataError(f"token file {self.path} cannot be read: {explain(error)}") from None
        if hashlib.sha256(digests).hexdigest() != self.header.digests_hash:
            raise DataError(
                f"{self.path}: the digests of its blocks (bytes {start} and later) are not what was written: the file "
                f"was changed, or its disk fails; restore it, or prepare it again"
            )
        return digests


class TokenFileWriter:
    """Writes a token file piece by piece; without `close` it stays a file that `TokenFile.open` refuses.

    A file is of documents, of rows of examples (`row_tokens`) or of rows of documents (`packed_row_tokens`), which
    are appended whole. At the end of a `with` block the system's file is closed, whether it is complete or not.
    """

    def __init__(
        self,
        path: pathlib.Path,
        tokenizer: Tokenizer,
        row_tokens: int | None = None,
        packed_row_tokens: int | None = None,
    ):
        self._path = path
        with system_errors(path, "written"):
            self._file = path.open("wb")
            self._file.write(bytes(HEADER_BYTES))
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._row_tokens, self._packed_row_tokens = row_tokens, packed_row_tokens
        self._hasher = BlockHasher()
        self.num_tokens = 0
        self.num_documents = 0

    def __enter__(self) -> "TokenFileWriter":
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(OSError):  # of a part that is not kept; `close` reports those of the whole
            self._file.close()

    def append(self, ids: np.ndarray, num_documents: int) -> None:
        """Writes the ids of whole documents, each with its end."""
        self._append(ids.astype(self._dtype, copy=False).tobytes(), len(ids), num_documents)

    def append_row(self, examples: Sequence[MaskedIds]) -> None:
        """Writes a row of examples that fit, and padding."""
        row = Row.of(examples, self._row_tokens, padding_id=self._tokenizer.eos_id)
        self._append(row.to_bytes(self._dtype), self._row_tokens, len(examples))

    def _append(self, content: bytes, num_tokens: int, num_documents: int) -> None:
        with system_errors(self._path, "written"):
            self._file.write(content)
        self._hasher.update(content)
        self.num_tokens += num_tokens
        self.num_documents += num_documents

    def close(self) -> Header:
        """Writes the header, and all of it to disk."""
        header = _header(self._path, self._tokenizer, self.num_tokens, self.num_documents, self._hasher, None)
        rows = {"row_tokens": self._row_tokens, "packed_row_tokens": self._packed_row_tokens}
        header = dataclasses.replace(header, **rows)
        with system_errors(self._path, "written"), self._file:
            self._file.write(self._hasher.digests())
            self._file.seek(0)
            self._file.write(header.to_bytes())
            self._file.flush()
            os.fsync(self._file.fileno())
        return header


def wrap_flat_file(
    path: pathlib.Path, flat_file: pathlib.Path, tokenizer: Tokenizer, progress: Callable[[int], None]
) -> Header:
    """Writes a token file that points to `flat_file`, uint16 ids without a header as the PyTorch release stores them.

    The ids are read once, to check them against the vocabulary, to count documents and for the digests.
    `progress` is called with the number of tokens of each block read.
    """
    dtype = np.dtype("<u2")
    if tokenizer.vocab_size > 2**16:
        raise DataError(
            f"{flat_file}: ids of a vocabulary of {tokenizer.vocab_size} do not fit the uint16 of a flat file"
        )
    hasher = BlockHasher()
    num_tokens = num_documents = 0
    with _open_flat_file(flat_file) as file:
        while content := file.read(_BLOCK_TOKENS * dtype.itemsize):
            block = np.frombuffer(content, dtype)
            outside = block >= tokenizer.vocab_size
            if outside.any():
                position = int(outside.argmax())
                raise DataError(
                    f"{flat_file}: token id {block[position]} at position {num_tokens + position} is outside the "
                    f"vocabulary of {tokenizer.vocab_size}"
                )
            hasher.update(content)
            num_tokens += len(block)
            num_documents += int((block == tokenizer.eos_id).sum())
            progress(len(block))
    num_documents += int(block[-1] != tokenizer.eos_id)  # the last one may lack its end
    header = _header(path, tokenizer, num_tokens, num_documents, hasher, str(flat_file.resolve()))
    with system_errors(path, "written"):
        path.write_bytes(header.to_bytes() + hasher.digests())
    return header


@contextlib.contextmanager
def _open_flat_file(path: pathlib.Path) -> Iterator[BinaryIO]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0 or size % 2:
                raise DataError(f"{path} has {size} bytes, which is not a whole, positive number of uint16 ids")
            yield file
    except OSError as error:
        raise DataError(f"{path} cannot be read: {explain(error)}") from None


def _header(
    path: pathlib.Path,
    tokenizer: Tokenizer,
    num_tokens: int,
    num_documents: int,
    hasher: BlockHasher,
    data_file: str | None,
) -> Header:
    return Header(
        dtype=token_dtype(tokenizer.vocab_size).name,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        num_tokens=num_tokens,
        num_documents=num_documents,
        tokenizer_hash=tokenizer.hash,
        content_hash=hasher.hexdigest(),
        data_file=data_file,
        name=path.name,
        block_bytes=BLOCK_BYTES,
        digests_hash=hashlib.sha256(hasher.digests()).hexdigest(),
    )
