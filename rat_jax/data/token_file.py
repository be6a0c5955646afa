"""Token files: ids of one split in one flat, memory-mapped file behind a header of fixed size.

  bytes 0 .. 7       RATTOKEN
  bytes 8 .. 11      format version, uint32, little endian
  bytes 12 .. 8191   the header's fields as JSON, then spaces
  bytes 8192 ..      the ids, uint16 or uint32, little endian, each document followed by the end-of-document id

A header may point to a flat file without a header instead (the PyTorch release's `.bin`): `data_file`, never copied.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.tokenizer import Tokenizer, token_dtype

MAGIC = b"RATTOKEN"
FORMAT_VERSION = 1
HEADER_BYTES = 8192
_BLOCK_TOKENS = 1 << 24


@dataclasses.dataclass(frozen=True)
class Header:
    """What a token file says of itself."""

    dtype: str  # uint16 or uint32
    vocab_size: int
    eos_id: int
    num_tokens: int  # ends of documents included
    num_documents: int
    tokenizer_hash: str
    content_hash: str  # SHA-256 of the ids as stored
    data_file: str | None  # absolute path of a flat file that holds the ids; None: they follow the header

    def to_bytes(self) -> bytes:
        fields = json.dumps(dataclasses.asdict(self)).encode()
        content = MAGIC + FORMAT_VERSION.to_bytes(4, "little") + fields
        if len(content) > HEADER_BYTES:
            raise DataError(f"the path of {self.data_file} is too long for a token file's header")
        return content.ljust(HEADER_BYTES)

    @classmethod
    def read(cls, path: pathlib.Path) -> "Header":
        try:
            with path.open("rb") as file:
                content = file.read(HEADER_BYTES)
        except OSError as error:
            raise DataError(f"token file {path} cannot be read: {error.strerror}") from None
        if content[:8] != MAGIC:
            raise DataError(
                f"{path} is not a token file: it does not start with {MAGIC.decode()}. A flat file of ids is read with "
                f"`python -m rat_jax.data.prepare --source release-bin:{path}`"
            )
        version = int.from_bytes(content[8:12], "little")
        if version != FORMAT_VERSION:
            raise DataError(f"{path} has format version {version}; this code reads version {FORMAT_VERSION}")
        try:
            header = cls(**json.loads(content[12:]))
        except (ValueError, TypeError) as error:
            raise DataError(f"the header of {path} is damaged: {error}") from None
        if header.dtype not in ("uint16", "uint32"):
            raise DataError(f"the header of {path} is damaged: dtype {header.dtype!r} is neither uint16 nor uint32")
        return header


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A token file, open for reading. Only the path is pickled, so that worker processes map the file themselves."""

    path: pathlib.Path
    header: Header

    @classmethod
    def open(cls, path: pathlib.Path | str) -> "TokenFile":
        """Reads the header and checks that all tokens are there.

        Raises:
          DataError: not a token file, a damaged header, or a size that is not the promised one.
        """
        path = pathlib.Path(path)
        header = Header.read(path)
        data_path, offset = (path, HEADER_BYTES) if header.data_file is None else (pathlib.Path(header.data_file), 0)
        try:
            size = data_path.stat().st_size
        except OSError as error:
            raise DataError(f"{data_path}, which {path} points to, cannot be read: {error.strerror}") from None
        expected = offset + header.num_tokens * np.dtype(header.dtype).itemsize
        if size != expected:
            raise DataError(
                f"{data_path} has {size} bytes, but the header of {path} promises {header.num_tokens} tokens, "
                f"{expected} bytes: the file was cut short or changed; prepare it again"
            )
        return cls(path, header)

    def __len__(self) -> int:
        return self.header.num_tokens

    def __getstate__(self):
        return {"path": self.path, "header": self.header}

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """All ids, memory-mapped, read-only, in the dtype of the file and unchecked."""
        path, offset = (self.path, HEADER_BYTES) if self.header.data_file is None else (self.header.data_file, 0)
        dtype = np.dtype(self.header.dtype).newbyteorder("<")
        return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(len(self),))


class TokenFileWriter:
    """Writes a token file piece by piece; without `close` it stays a file that `TokenFile.open` refuses."""

    def __init__(self, path: pathlib.Path, tokenizer: Tokenizer):
        self._file = path.open("wb")
        self._file.write(bytes(HEADER_BYTES))
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._digest = hashlib.sha256()
        self.num_tokens = 0
        self.num_documents = 0

    def append(self, ids: np.ndarray, num_documents: int) -> None:
        """Writes the ids of whole documents, each with its end."""
        content = ids.astype(self._dtype, copy=False).tobytes()
        self._file.write(content)
        self._digest.update(content)
        self.num_tokens += len(ids)
        self.num_documents += num_documents

    def close(self) -> Header:
        """Writes the header, and all of it to disk."""
        header = Header(
            dtype=self._dtype.name,
            vocab_size=self._tokenizer.vocab_size,
            eos_id=self._tokenizer.eos_id,
            num_tokens=self.num_tokens,
            num_documents=self.num_documents,
            tokenizer_hash=self._tokenizer.hash,
            content_hash=self._digest.hexdigest(),
            data_file=None,
        )
        self._file.seek(0)
        self._file.write(header.to_bytes())
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return header


def wrap_flat_file(
    path: pathlib.Path, flat_file: pathlib.Path, tokenizer: Tokenizer, progress: Callable[[int], None]
) -> Header:
    """Writes a token file that points to `flat_file`, uint16 ids without a header as the PyTorch release stores them.

    The ids are read once, to check them against the vocabulary, to count documents and for the content hash.
    `progress` is called with the number of tokens of each block read.
    """
    dtype = np.dtype("<u2")
    if tokenizer.vocab_size > 2**16:
        raise DataError(
            f"{flat_file}: ids of a vocabulary of {tokenizer.vocab_size} do not fit the uint16 of a flat file"
        )
    try:
        size = flat_file.stat().st_size
    except OSError as error:
        raise DataError(f"{flat_file} cannot be read: {error.strerror}") from None
    if size == 0 or size % dtype.itemsize:
        raise DataError(f"{flat_file} has {size} bytes, which is not a whole, positive number of uint16 ids")
    ids = np.memmap(flat_file, dtype=dtype, mode="r")
    digest = hashlib.sha256()
    num_documents = int(ids[-1] != tokenizer.eos_id)  # the last one may lack its end
    for start in range(0, len(ids), _BLOCK_TOKENS):
        block = ids[start : start + _BLOCK_TOKENS]
        outside = block >= tokenizer.vocab_size
        if outside.any():
            position = int(outside.argmax())
            raise DataError(
                f"{flat_file}: token id {block[position]} at position {start + position} is outside the vocabulary of "
                f"{tokenizer.vocab_size}"
            )
        digest.update(block.tobytes())
        num_documents += int((block == tokenizer.eos_id).sum())
        progress(len(block))
    header = Header(
        dtype=dtype.name,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        num_tokens=len(ids),
        num_documents=num_documents,
        tokenizer_hash=tokenizer.hash,
        content_hash=digest.hexdigest(),
        data_file=str(flat_file.resolve()),
    )
    path.write_bytes(header.to_bytes())
    return header
