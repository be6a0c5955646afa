"""The header of a token file: what its ids are, and what they must hash to.

  bytes 0 .. 7       RATTOKEN
  bytes 8 .. 11      format version, uint32, little endian
  bytes 12 .. 43     SHA-256 of bytes 44 .. 8191
  bytes 44 .. 8191   the header's fields as JSON, then spaces

In format 1 the fields start at byte 12, and nothing checks them.
"""

import dataclasses
import hashlib
import json
import os
import pathlib

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.integrity import BLOCK_BYTES
from rat_jax.data.json_object import build, is_digest, parse_object, require
from rat_jax.data.row import ADDED_BYTES
from rat_jax.data.tokenizer import token_dtype

MAGIC = b"RATTOKEN"
FORMAT_VERSION = 2
_READ_VERSIONS = (1, FORMAT_VERSION)
HEADER_BYTES = 8192
_FIELDS_START = {1: 12, 2: 44}


@dataclasses.dataclass(frozen=True)
class Header:
    """What a token file says of itself."""

    dtype: str  # uint16 or uint32
    vocab_size: int
    eos_id: int
    num_tokens: int  # ends of documents included, and padding of rows
    num_documents: int
    tokenizer_hash: str
    content_hash: str  # SHA-256 of the ids as stored, and of what is stored with them
    data_file: str | None  # absolute path of a flat file that holds the ids; None: they follow the header
    name: str | None = None  # of the file as it was written, train.bin or validation.bin; None in format 1
    block_bytes: int | None = None  # that one digest is of; None in format 1
    digests_hash: str | None = None  # SHA-256 of the digests of all blocks; None in format 1
    row_tokens: int | None = None  # of a row of examples (`rat_jax.data.row`), padding included; None: documents
    packed_row_tokens: int | None = None  # of a row of whole documents (`rat_jax.data.packed_rows`); None: a stream

    @property
    def num_bytes(self) -> int:
        """Of the ids; of rows also of what is stored with them."""
        added = 0 if self.row_tokens is None else ADDED_BYTES
        return self.num_tokens * (np.dtype(self.dtype).itemsize + added)

    def to_bytes(self) -> bytes:
        fields = json.dumps(dataclasses.asdict(self)).encode().ljust(HEADER_BYTES - _FIELDS_START[FORMAT_VERSION])
        content = MAGIC + FORMAT_VERSION.to_bytes(4, "little") + hashlib.sha256(fields).digest() + fields
        if len(content) > HEADER_BYTES:
            raise DataError(f"the path of {self.data_file} is too long for a token file's header")
        return content

    @classmethod
    def from_bytes(cls, content: bytes, path: pathlib.Path) -> "Header":
        """The header that the first `HEADER_BYTES` bytes of the token file `path` hold.

        Raises:
          DataError: if they hold none, or a damaged one.
        """
        name = f"the header of {path}"
        if content[:8] != MAGIC:
            raise DataError(
                f"{path} is not a token file: it does not start with {MAGIC.decode()}. A flat file of ids is read with "
                f"`python -m rat_jax.data.prepare --source release-bin:{path}`"
            )
        version = int.from_bytes(content[8:12], "little")
        if version not in _READ_VERSIONS:
            known = " and ".join(map(str, _READ_VERSIONS))
            raise DataError(f"{path} has format version {version}; this code reads versions {known}")
        require(len(content) == HEADER_BYTES, name, f"the file ends after {len(content)} bytes")
        fields = content[_FIELDS_START[version] :]
        if version == FORMAT_VERSION:
            require(content[12:44] == hashlib.sha256(fields).digest(), name, "its checksum is another one")
        header = build(cls, parse_object(fields, name), name)
        header._check(version, name)
        return header

    def _check(self, version: int, name: str) -> None:
        require(self.vocab_size >= 1, name, f"vocab_size is {self.vocab_size}")
        require(self.dtype in ("uint16", "uint32"), name, f"dtype {self.dtype!r} is neither uint16 nor uint32")
        expected = token_dtype(self.vocab_size)
        require(expected.name == self.dtype, name, f"dtype is {self.dtype} for a vocabulary of {self.vocab_size}")
        require(0 <= self.eos_id < self.vocab_size, name, f"eos_id {self.eos_id} is outside the vocabulary")
        # A last document may lack its end.
        require(0 <= self.num_tokens <= 2**50, name, f"num_tokens is {self.num_tokens}")
        require(0 <= self.num_documents <= self.num_tokens, name, f"num_documents is {self.num_documents}")
        for field in ("tokenizer_hash", "content_hash"):
            require(is_digest(getattr(self, field)), name, f"{field} is no SHA-256")
        if self.data_file is not None:
            require(_is_absolute(self.data_file), name, f"data_file {self.data_file!r} is no absolute path")
        if self.row_tokens is not None:
            fits = self.row_tokens >= 2 and self.num_tokens % self.row_tokens == 0
            require(fits and version > 1 and self.data_file is None, name, f"row_tokens is {self.row_tokens}")
        if self.packed_row_tokens is not None:
            fits = self.packed_row_tokens >= 2 and self.num_tokens % self.packed_row_tokens == 0
            fits &= version > 1 and self.data_file is None and self.row_tokens is None
            require(fits, name, f"packed_row_tokens is {self.packed_row_tokens}")
        added = (self.name, self.block_bytes, self.digests_hash)
        if version == 1:
            require(added == (None, None, None), name, "it has fields of a later format")
            return
        require(None not in added and is_digest(self.digests_hash), name, "a field of its format is missing")
        require(self.block_bytes == BLOCK_BYTES, name, f"block_bytes is {self.block_bytes}, not {BLOCK_BYTES}")


def _is_absolute(path: str) -> bool:
    try:
        return "\0" not in path and bool(os.fsencode(path)) and os.path.isabs(path)
    except UnicodeEncodeError:  # halves of surrogate pairs
        return False
