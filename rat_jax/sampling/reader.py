"""Prompts on their way into slots: which are read together, and how far they have been read."""

import collections
import itertools
from collections.abc import Iterable

import numpy as np

from rat_jax.sampling.prefill import chunk_of, plan_chunks
from rat_jax.sampling.slots import Entries
from rat_jax.sampling.submitted import Row, Submitted

LOOK_AHEAD = 256  # waiting prompts among which those of like length are looked for


def like_prompts(waiting: Iterable[Submitted], count: int) -> list[Submitted]:
    """The first that waits, and up to `count` - 1 of those behind it whose lengths are nearest to its own."""
    candidates = list(itertools.islice(waiting, LOOK_AHEAD))
    length = len(candidates[0].prompt)
    return sorted(candidates, key=lambda one: abs(len(one.prompt) - length))[:count]  # stable: the first stays first


class PromptReader:
    """A group of prompts that are read together and then wait for slots. The caller runs the programs."""

    def __init__(self, chunk_sizes: tuple[int, ...]):
        self.num_tokens = self.num_padded_tokens = 0  # of all prompts so far; the second with their padding
        self.num_rows = 0  # of the group, spare ones among them
        self._chunk_sizes = chunk_sizes
        self._group: list[Submitted] = []
        self._chunks: collections.deque[int] = collections.deque()
        self._start = 0
        self._samples: collections.deque[tuple[int, Submitted]] = collections.deque()

    @property
    def is_reading(self) -> bool:
        """Whether chunks are left."""
        return len(self._chunks) > 0

    @property
    def is_ready(self) -> bool:
        """Whether rows that have been read wait for slots."""
        return not self.is_reading and len(self._samples) > 0

    @property
    def is_empty(self) -> bool:
        """Whether it can begin with other prompts."""
        return not self.is_reading and not self._samples

    def begin(self, group: list[Submitted], num_rows: int) -> None:
        """Starts to read prompts, in a group of so many rows or fewer."""
        self._group, self.num_rows, self._start = group, num_rows, 0
        self._chunks.extend(plan_chunks(max(len(one.prompt) for one in group), self._chunk_sizes))
        self._samples.extend((row, one) for row, one in enumerate(group) for _ in range(one.request.num_samples))
        self.num_tokens += sum(len(one.prompt) for one in group)
        self.num_padded_tokens += sum(self._chunks) * num_rows

    def next_chunk(self) -> tuple[np.ndarray, np.ndarray]:
        """The arguments of `prefill.read_chunk` for the chunk that comes next."""
        size = self._chunks.popleft()
        chunk = chunk_of([one.prompt for one in self._group], self._start, size, self.num_rows)
        self._start += size
        return chunk

    def drop(self, submitted: Submitted) -> None:
        """Forgets the samples of a request that are not in slots yet; a group without any is read no further."""
        self._samples = collections.deque(place for place in self._samples if place[1] is not submitted)
        if not self._samples:
            self._chunks.clear()

    def take(self, free: list[int], num_slots: int) -> tuple[Entries, list[Row]]:
        """As many rows as there are free slots, which are taken from the list, but no more than the group's."""
        entries, rows = Entries.none(self.num_rows, num_slots), []
        while self._samples and free and len(rows) < self.num_rows:
            index, submitted = self._samples.popleft()
            row = Row(submitted, submitted.num_started, free.pop())
            submitted.num_started += 1
            submitted.rows[row.sample] = row
            request = submitted.request
            values = (index, row.slot, submitted.digest, submitted.copy + row.sample)
            for array, value in zip(entries, (*values, request.min_new_tokens, request.max_new_tokens), strict=True):
                array[len(rows)] = value
            rows.append(row)
        return entries, rows
