"""Rows of examples to batches: what `rat_jax.data.windows` is for documents."""

import dataclasses

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.batch import Batch
from rat_jax.data.corpus import Corpus, Split
from rat_jax.data.row import Row
from rat_jax.data.token_file import TokenFile
from rat_jax.data_config import DataConfig


@dataclasses.dataclass(frozen=True)
class ExampleRows:
    """The rows of a token file of examples: record i is row i, and answers alone are targets."""

    file: TokenFile
    seq_len: int
    segment_documents: bool
    first_target_id: int

    @classmethod
    def open(cls, corpus: Corpus, split: Split, config: DataConfig) -> "ExampleRows":
        """The rows of a split.

        Raises:
          DataError: if the config asks for rows of another length, or for ones in which examples see each other.
        """
        file = corpus.token_file(split)
        if config.seq_len != file.header.row_tokens:
            raise DataError(
                f"{corpus.path} holds rows of {file.header.row_tokens} tokens, and data.seq_len is {config.seq_len}: "
                f"set it to {file.header.row_tokens}, or prepare the data with --seq_len {config.seq_len}"
            )
        if corpus.examples.rows == "packed" and not config.segment_documents:
            raise DataError(
                f"a row of {corpus.path} holds several examples, which must not see each other: set "
                f"data.segment_documents to True, or prepare the data with --rows padded"
            )
        return cls(file, config.seq_len, config.segment_documents, config.first_target_id)

    @property
    def num_full(self) -> int:
        """Rows that may be learned from: all."""
        return len(self.file) // self.seq_len

    @property
    def num_all(self) -> int:
        """Rows."""
        return self.num_full

    def rows(self, indices: list[int]) -> Batch:
        """The rows of these indices; an index at or past `num_all` is a row of padding.

        Token t's target is token t + 1 of its own example. Its weight is 1 where that is a part of an answer.

        Raises:
          DataError: if they are not those that were written, naming file and block, or if an id is outside the
            vocabulary, naming file, row and position.
        """
        shape = (len(indices), self.seq_len)
        tokens, targets, segment_ids = (np.zeros(shape, np.int32) for _ in range(3))
        weights = np.zeros(shape, np.float32)
        for place, index in enumerate(indices):
            if index >= self.num_all:
                continue
            row = self._read(index)
            tokens[place], targets[place, :-1], segment_ids[place] = row.ids, row.ids[1:], row.segment_ids
            weights[place, :-1] = self._is_target(row)
        return Batch(tokens, targets, weights, segment_ids if self.segment_documents else None)

    def read_ahead(self, index: int) -> None:
        """Has the system read a row that will be asked for soon."""
        if index < self.num_all:
            self.file.read_row_ahead(index)

    def has_target(self, index: int) -> bool:
        """Whether a target of a row counts in the loss; none of a row past the end does."""
        return index < self.num_all and bool(self._is_target(self._read(index)).any())

    def _is_target(self, row: Row) -> np.ndarray:
        """Of all ids but the first."""
        same_example = row.segment_ids[1:] == row.segment_ids[:-1]
        return row.is_answer[1:] & same_example & (row.ids[1:] >= self.first_target_id)

    def _read(self, index: int) -> Row:
        row = self.file.read_row(index)
        vocab_size = self.file.header.vocab_size
        if (row.ids >= vocab_size).any():
            position = int((row.ids >= vocab_size).argmax())
            raise DataError(
                f"{self.file.path}, row {index}, position {position}: id {row.ids[position]} is outside the vocabulary "
                f"of {vocab_size}; the file was changed, prepare it again"
            )
        return row
