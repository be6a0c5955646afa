"""Encodes examples, and keeps them on disk until it is known which of them share a row."""

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import IO

import numpy as np

from rat_jax.data.answer_mask import MaskedIds, masked_ids
from rat_jax.data.corpus import Split
from rat_jax.data.encoding import TextEncoder
from rat_jax.data.example import Example
from rat_jax.data.tokenizer import Tokenizer, token_dtype
from rat_jax.files import system_errors


@dataclasses.dataclass
class ExamplePart:
    """Some encoded examples of one split."""

    split: Split
    examples: list[MaskedIds]
    num_records: int
    num_cut: int  # prompts that lost their middle
    num_left_out: int  # answers that alone fill a row


@dataclasses.dataclass(frozen=True)
class ExampleEncoder(TextEncoder):
    """Makes masked ids of examples, each short enough for a row of `seq_len`."""

    tokenizer: Tokenizer
    seq_len: int

    def encode(self, documents: list[tuple[Split | None, str]]) -> list[ExamplePart]:
        """The parts of some examples, whose splits are known."""
        parts: dict[Split, ExamplePart] = {}
        for split, text in documents:
            part = parts.setdefault(split, ExamplePart(split, [], 0, 0, 0))
            part.num_records += 1
            for masked, was_cut in masked_ids(Example.from_text(text), self.tokenizer, self.seq_len):
                if masked is None:
                    part.num_left_out += 1
                else:
                    part.examples.append(masked)
                    part.num_cut += was_cut
        return list(parts.values())


class ExampleSpool:
    """Encoded examples in a file, one after the other, and their counts in memory."""

    def __init__(self, file: IO[bytes], name: pathlib.Path, tokenizer: Tokenizer):
        """Takes an empty file, open for reading and writing, and its name for messages."""
        self.lengths: list[int] = []  # tokens of each example
        self.num_answer_tokens = self.num_cut = self.num_left_out = 0
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._file = file
        self._name = name
        self._starts = [0]

    def append(self, part: ExamplePart) -> None:
        """Takes the next examples.

        Raises:
          FileError: if the system refuses.
        """
        self.num_cut += part.num_cut
        self.num_left_out += part.num_left_out
        with system_errors(self._name, "written"):
            for example in part.examples:
                content = example.ids.astype(self._dtype).tobytes() + example.is_answer.tobytes()
                self._file.write(content)
                self._starts.append(self._starts[-1] + len(content))
                self.lengths.append(len(example.ids))
                self.num_answer_tokens += int(example.is_answer.sum())

    def read(self, rows: list[list[int]]) -> Iterator[list[MaskedIds]]:
        """The examples of each row; errors as of `append`."""
        for row in rows:
            with system_errors(self._name, "read"):
                yield [self._read(index) for index in row]

    def _read(self, index: int) -> MaskedIds:
        self._file.seek(self._starts[index])
        content = self._file.read(self._starts[index + 1] - self._starts[index])
        end = self.lengths[index] * self._dtype.itemsize
        return MaskedIds(np.frombuffer(content[:end], self._dtype), np.frombuffer(content[end:], bool))
