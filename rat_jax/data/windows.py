"""Documents to batches: windows of fixed length over the stream of a token file, or its rows of whole documents.

Record i is the window of tokens i T .. i T + T: T inputs and, one further, T targets. Neighbouring records share one
token, so that each token is a target once. Rows of whole documents (`rat_jax.data.packed_rows`) share none: record i is
tokens i T .. i T + T - 1, of which the last has no target.
"""

import dataclasses

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.batch import Batch
from rat_jax.data.token_file import TokenFile


@dataclasses.dataclass(frozen=True)
class Windows:
    """The records of a token file."""

    file: TokenFile
    seq_len: int
    segment_documents: bool
    first_target_id: int

    @property
    def num_full(self) -> int:
        """Records that need no padding."""
        return max(len(self.file) - self._num_shared, 0) // self.seq_len

    @property
    def num_all(self) -> int:
        """Records, with the last one that may be shorter."""
        return -(-max(len(self.file) - self._num_shared, 0) // self.seq_len)

    @property
    def is_packed(self) -> bool:
        """Whether records are rows of whole documents."""
        return self.file.header.packed_row_tokens is not None

    @property
    def _num_shared(self) -> int:
        """Tokens of a record that are the next one's, too."""
        return 0 if self.is_packed else 1

    def rows(self, indices: list[int]) -> Batch:
        """The records of these indices, one a row; an index at or past `num_all` is a row of padding.

        Raises:
          DataError: if ids are not those that were written, naming file and block, or if one is outside the
            vocabulary, naming file, record and position.
        """
        shape = (len(indices), self.seq_len + 1)
        windows, lengths = np.zeros(shape, np.int32), np.zeros(len(indices), np.int64)
        for row, index in enumerate(indices):
            ids = self._read(index)
            self._check(ids, index)
            windows[row, : len(ids)], lengths[row] = ids, len(ids)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        is_end = tokens == self.file.header.eos_id
        is_token = np.arange(self.seq_len) < lengths[:, None] - 1  # tokens that have a target
        segment_ids = None
        if self.segment_documents:
            ends_before = np.cumsum(is_end, axis=1, dtype=np.int32) - is_end
            if self.is_packed:
                is_token[:, 1:] &= ~(is_end[:, 1:] & is_end[:, :-1])  # padding
            segment_ids = np.where(is_token, 1 + ends_before, 0).astype(np.int32)
        return Batch(
            tokens=np.ascontiguousarray(tokens),
            targets=np.ascontiguousarray(targets),
            loss_weights=(is_token & ~is_end & (targets >= self.first_target_id)).astype(np.float32),
            segment_ids=segment_ids,
        )

    def read_ahead(self, index: int) -> None:
        """Has the system read a record that will be asked for soon."""
        self.file.read_ahead(index * self.seq_len, (index + 1) * self.seq_len + self._num_shared)

    def has_target(self, index: int) -> bool:
        """Whether a target of a record counts in the loss."""
        ids = self._read(index)
        return bool(((ids[1:] >= self.first_target_id) & (ids[:-1] != self.file.header.eos_id)).any())

    def _read(self, index: int) -> np.ndarray:
        return self.file.read(index * self.seq_len, (index + 1) * self.seq_len + self._num_shared)

    def _check(self, ids: np.ndarray, index: int) -> None:
        vocab_size = self.file.header.vocab_size
        outside = ids >= vocab_size
        if outside.any():
            position = int(outside.argmax())
            raise DataError(
                f"{self.file.path}, record {index} of {self.seq_len} tokens, position {position} (token "
                f"{index * self.seq_len + position} of the file): id {ids[position]} is outside the vocabulary of "
                f"{vocab_size}; the file was changed, prepare it again"
            )
