"""A row of examples as a token file holds it: the ids, the example of each, and which of them are answers.

A row of T tokens is

  T ids                uint16 or uint32, little endian
  T segment ids        uint32, little endian: 1, 2, ... for the examples of the row, 0 on padding
  T bytes              1 for an id of an answer, the end of the answer among them; 0 for any other
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rat_jax.data.answer_mask import MaskedIds

_SEGMENTS = np.dtype("<u4")
ADDED_BYTES = _SEGMENTS.itemsize + 1  # of a token, beside its id


class Row(NamedTuple):
    """The arrays of a row, [T] each."""

    ids: np.ndarray
    segment_ids: np.ndarray
    is_answer: np.ndarray

    @classmethod
    def of(cls, examples: Sequence[MaskedIds], row_tokens: int, padding_id: int) -> "Row":
        """Examples one after the other, and padding; they must fit."""
        ids = np.concatenate([example.ids for example in examples])
        lengths = [len(example.ids) for example in examples]
        padding = (0, row_tokens - len(ids))
        return cls(
            ids=np.pad(ids, padding, constant_values=padding_id),
            segment_ids=np.pad(np.repeat(np.arange(1, len(lengths) + 1), lengths), padding),
            is_answer=np.pad(np.concatenate([example.is_answer for example in examples]), padding),
        )

    def to_bytes(self, dtype: np.dtype) -> bytes:
        """As a file of ids of this dtype holds it."""
        parts = self.ids.astype(dtype), self.segment_ids.astype(_SEGMENTS), self.is_answer.astype(np.uint8)
        return b"".join(part.tobytes() for part in parts)

    @classmethod
    def from_bytes(cls, content: bytes, dtype: np.dtype) -> "Row":
        """What `to_bytes` wrote."""
        num_tokens = len(content) // (dtype.itemsize + ADDED_BYTES)
        ends = num_tokens * dtype.itemsize, num_tokens * (dtype.itemsize + _SEGMENTS.itemsize)
        return cls(
            np.frombuffer(content[: ends[0]], dtype),
            np.frombuffer(content[ends[0] : ends[1]], _SEGMENTS),
            np.frombuffer(content[ends[1] :], np.uint8) > 0,
        )
