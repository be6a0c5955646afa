"""Batches that are read ahead, by a thread or by worker processes."""

import contextlib
import re
from collections.abc import Generator
from typing import Any

import grain
from absl import flags

from rat_jax.data import DataError
from rat_jax.data.workers import describe_death, follow_parent, shielded

_BATCHES_AHEAD = 2  # that a reading thread or process may be ahead of what was asked for


class ReaderError(DataError):
    """A process that reads has died; the message says of what."""


def read(batches: grain.MapDataset, first: int, num_workers: int) -> Generator[Any, None, None]:
    """The batches from number `first` on, read ahead by one thread, or by `num_workers` processes.

    Nothing is started before the first batch is asked for; `close`, or dropping the iterator, ends what was started.

    Raises:
      ReaderError: from `next`, if one of the processes died.
    """
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=_BATCHES_AHEAD)
    dataset = batches[first:].to_iter_dataset(options)
    if num_workers > 0:
        if not flags.FLAGS.is_parsed():  # as in library use: Grain's workers look at flags, which then have defaults
            flags.FLAGS.mark_as_parsed()
        ahead = grain.MultiprocessingOptions(num_workers, per_worker_buffer_size=_BATCHES_AHEAD)
        dataset = dataset.mp_prefetch(ahead, worker_init_fn=_start_worker)
    iterator = iter(dataset)
    try:
        with shielded() if num_workers else contextlib.nullcontext():  # the first batch starts all processes
            batch = _next(iterator)
        while batch is not None:
            yield batch
            batch = _next(iterator)
    finally:
        iterator.close()


def _next(iterator: grain.DatasetIterator) -> Any | None:
    try:
        return next(iterator, None)
    except RuntimeError as error:  # Grain's has no class of its own
        if (
            death := re.search(r"Worker process was terminated unexpectedly with exit code (-?\d+)", str(error))
        ) is None:
            raise
        raise ReaderError(f"a process that reads the data died: {describe_death(int(death[1]))}") from None


def _start_worker(index: int, count: int) -> None:
    follow_parent()
