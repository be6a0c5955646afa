"""A training split in rows of whole documents, written by `rat_jax.data.prepare --packing`."""

import pathlib

import numpy as np

from rat_jax.data.packing import best_fit
from rat_jax.data.token_file import TokenFileWriter
from rat_jax.data.token_header import Header
from rat_jax.data.tokenizer import Tokenizer

PACKED_TOKENS = 1 << 26  # that are in memory and packed at a time; packed rows of all tokens would hold little more


class PackedWriter:
    """Takes documents as `TokenFileWriter.append` does, and writes rows of T tokens.

    A document of more than T tokens, its end included, is cut into pieces of T and a rest. Pieces are put into rows by
    best fit; a rest of one token, which predicts nothing, is left out. Ends of documents fill up a row: behind another
    end they are padding. Only pieces that fill a row lack an end, so that ends tell pieces apart.
    """

    def __init__(self, path: pathlib.Path, tokenizer: Tokenizer, row_tokens: int):
        """Opens the file of the split; errors as of `TokenFileWriter`."""
        self._writer = TokenFileWriter(path, tokenizer, packed_row_tokens=row_tokens)
        self._row_tokens, self._eos_id = row_tokens, tokenizer.eos_id
        self._waiting: list[np.ndarray] = []  # pieces
        self._num_waiting = 0  # tokens of them
        self.num_padding = 0

    @property
    def num_tokens(self) -> int:
        """Of all that was taken, and of padding."""
        return self._writer.num_tokens + self._num_waiting

    def __enter__(self) -> "PackedWriter":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.__exit__(*error)

    def append(self, ids: np.ndarray, num_documents: int) -> None:
        """Takes the ids of whole documents, each with its end."""
        ends = np.flatnonzero(ids == self._eos_id) + 1
        for document in np.split(ids, ends[:-1]):
            for start in range(0, len(document), self._row_tokens):
                piece = document[start : start + self._row_tokens]
                if len(piece) > 1:
                    self._waiting.append(piece)
                    self._num_waiting += len(piece)
        if self._num_waiting >= PACKED_TOKENS:
            self._write()

    def close(self) -> Header:
        """Writes what is left, and the header, in which pieces count as documents."""
        self._write()
        return self._writer.close()

    def _write(self) -> None:
        members = best_fit([len(piece) for piece in self._waiting], self._row_tokens)
        rows = np.full((len(members), self._row_tokens), self._eos_id, np.int64)
        for row, pieces in zip(rows, members, strict=True):
            ids = np.concatenate([self._waiting[piece] for piece in pieces])
            row[: len(ids)] = ids
        self._writer.append(rows.reshape(-1), len(self._waiting))
        self.num_padding += rows.size - self._num_waiting
        self._waiting, self._num_waiting = [], 0
