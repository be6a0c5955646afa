"""Encodes a stream of documents, in several processes and in order."""

import abc
import collections
import concurrent.futures
import concurrent.futures.process
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from rat_jax.data import DataError
from rat_jax.data.corpus import Split
from rat_jax.data.splits import split_of
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.data.workers import describe_death, follow_parent, shielded

_BATCH_CHARACTERS = 1 << 20  # of documents that a worker gets at a time


@dataclasses.dataclass
class Part:
    """Some encoded documents of one split."""

    split: Split
    ids: np.ndarray  # of all documents, each with its end
    num_documents: int
    byte_counts: np.ndarray  # [256], of the text as UTF-8


class TextEncoder(abc.ABC):
    """Makes something of texts, in whichever process."""

    @abc.abstractmethod
    def encode(self, documents: list[tuple[Split | None, str]]) -> list[Any]:
        """The parts of some texts, which may have their splits."""


@dataclasses.dataclass(frozen=True)
class Encoder(TextEncoder):
    """Makes token ids of texts and sends each document to its split."""

    tokenizer: Tokenizer
    validation_fraction: float

    def encode(self, documents: list[tuple[Split | None, str]]) -> list[Part]:
        """The parts of some documents; a split of None is settled by `split_of`."""
        texts: dict[Split, list[str]] = {}
        for split, text in documents:
            texts.setdefault(split or split_of(text, self.validation_fraction), []).append(text)
        return [
            Part(
                split=split,
                ids=np.concatenate([self.tokenizer.encode_document(text) for text in part]),
                num_documents=len(part),
                byte_counts=np.bincount(np.frombuffer("".join(part).encode(), np.uint8), minlength=256),
            )
            for split, part in texts.items()
        ]


def encode(documents: Iterable[tuple[Split | None, str]], encoder: TextEncoder, *, num_workers: int) -> Iterator[Any]:
    """Encodes all documents in order, with at most two batches of them a worker in memory; yields the encoder's parts.

    Args:
      documents: texts that are not empty, with their split where it is known already.
      encoder: what is done with them.
      num_workers: processes; 0 encodes in this one. The result does not depend on it.

    Raises:
      DataError: if the tokenizer refuses a text, or a process dies.
    """
    if num_workers == 0:
        for batch in _batches(documents):
            yield from encoder.encode(batch)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        num_workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(encoder,),
    )
    workers: set[multiprocessing.process.BaseProcess] = set()
    under_way: collections.deque[concurrent.futures.Future[list[Any]]] = collections.deque()
    try:
        for batch in _batches(documents):
            before = set(multiprocessing.active_children())
            with shielded():  # a worker is started when there is work for it
                under_way.append(pool.submit(_encode_in_worker, batch))
            workers |= set(multiprocessing.active_children()) - before
            if len(under_way) >= 2 * num_workers:
                yield from under_way.popleft().result()
        while under_way:
            yield from under_way.popleft().result()
    except concurrent.futures.process.BrokenProcessPool:
        pool.shutdown()  # it ends the other workers with SIGTERM, and waits for them
        codes = {worker.exitcode for worker in workers} - {None, 0}
        first = min(codes, key=lambda code: code == -signal.SIGTERM, default=0)
        raise DataError(f"a process that encodes died: {describe_death(first)}") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[tuple[Split | None, str]]) -> Iterator[list[tuple[Split | None, str]]]:
    batch, size = [], 0
    for split, text in documents:
        batch.append((split, text))
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _start_worker(encoder: TextEncoder) -> None:
    follow_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    _worker_encoder.append(encoder)


def _encode_in_worker(documents: list[tuple[Split | None, str]]) -> list[Any]:
    return _worker_encoder[0].encode(documents)


_worker_encoder: list[TextEncoder] = []  # one, set by `_start_worker` in worker processes
