"""Token files to batches: windows of fixed length, shuffled without end for training, in order for validation.

Record i of a split is the window of tokens i T .. i T + T: T inputs and, one further, T targets. Neighbouring records
share one token, so that each token is a target once. Of examples record i is their row i (`rat_jax.data.example_rows`).
Global batch k holds the B records k B .. k B + B - 1 of the order, and of P hosts, host p yields its rows p B/P ..
(p+1) B/P - 1. Neither the number of hosts nor of reading processes changes which records form a batch.

The order of validation is 0, 1, 2, ... over all R records, or an evenly spread subset of M of them: the middles of M
equal parts of the split, records floor((2 i + 1) R / (2 M)) for i = 0 .. M - 1.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from rat_jax.config import DataConfig
from rat_jax.data import DataError
from rat_jax.data.batch import Batch
from rat_jax.data.corpus import Corpus, Split
from rat_jax.data.example_rows import ExampleRows
from rat_jax.data.readers import read
from rat_jax.data.token_file import TokenFile

FORMAT_VERSION = 1  # of the order and the content of batches
_ADDED_FIELDS = ("validation_content_hash",)  # of fingerprints


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
        return max(len(self.file) - 1, 0) // self.seq_len

    @property
    def num_all(self) -> int:
        """Records, with the last one that may be shorter."""
        return -(-max(len(self.file) - 1, 0) // self.seq_len)

    def rows(self, indices: list[int]) -> Batch:
        """The records of these indices, one a row; an index at or past `num_all` is a row of padding.

        Raises:
          DataError: if ids are not those that were written, naming file and block, or if one is outside the
            vocabulary, naming file, record and position.
        """
        shape = (len(indices), self.seq_len + 1)
        windows, lengths = np.zeros(shape, np.int32), np.zeros(len(indices), np.int64)
        for row, index in enumerate(indices):
            ids = self.file.read(index * self.seq_len, (index + 1) * self.seq_len + 1)
            self._check(ids, index)
            windows[row, : len(ids)], lengths[row] = ids, len(ids)
        tokens, targets = windows[:, :-1], windows[:, 1:]
        is_end = tokens == self.file.header.eos_id
        is_token = np.arange(self.seq_len) < lengths[:, None] - 1  # tokens that have a target
        segment_ids = None
        if self.segment_documents:
            ends_before = np.cumsum(is_end, axis=1, dtype=np.int32) - is_end
            segment_ids = np.where(is_token, 1 + ends_before, 0).astype(np.int32)
        return Batch(
            tokens=np.ascontiguousarray(tokens),
            targets=np.ascontiguousarray(targets),
            loss_weights=(is_token & ~is_end & (targets >= self.first_target_id)).astype(np.float32),
            segment_ids=segment_ids,
        )

    def has_target(self, index: int) -> bool:
        """Whether a target of a record counts in the loss."""
        ids = self.file.read(index * self.seq_len, min((index + 1) * self.seq_len + 1, len(self.file)))
        return bool(((ids[1:] >= self.first_target_id) & (ids[:-1] != self.file.header.eos_id)).any())

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


@dataclasses.dataclass(frozen=True)
class _LocalBatches:
    """The rows of every global batch that belong to this host, as a Grain data source: item k is of batch k."""

    windows: Windows | ExampleRows
    order: Sequence[int] | grain.MapDataset  # of record indices; endless if shuffled
    num_batches: int
    global_batch_size: int
    first_row: int
    num_rows: int

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, k: int) -> Batch:
        start = k * self.global_batch_size + self.first_row
        return self.windows.rows([self.order[i] for i in range(start, start + self.num_rows)])


class TrainData(Iterator[Batch]):
    """Endless batches of the training split: every record once an epoch, in a new order each time.

    An epoch is `num_records` records; batches run across its end. Tokens after the last full window are left out.
    `state` before a step and `restore` after a restart give the same batches again, on any number of hosts.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        vocab_size: int,
        seed: int,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        """Opens the split.

        Args:
          config: which files, and how they are cut.
          vocab_size: of the model; the files must have the same.
          seed: of the order.
          process_index: this host among `process_count`; None asks jax.
          process_count: hosts that each yield their rows; None asks jax.

        Raises:
          DataError: if the files are missing, damaged, too short or of another vocabulary, or if the batch does not
            divide among the hosts.
        """
        if not 0 <= seed < 2**32:
            raise DataError(f"seed must lie between 0 and 2**32 - 1, got {seed}")
        windows = _open(config, "train", vocab_size)
        if windows.num_full == 0:
            raise DataError(
                f"{windows.file.path} holds {len(windows.file)} tokens, less than one sequence of data.seq_len "
                f"{config.seq_len} and its next token"
            )
        self.num_records = windows.num_full
        self.fingerprint: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "num_tokens": len(windows.file),
            "content_hash": windows.file.header.content_hash,
            "validation_content_hash": _token_file(config, "validation", vocab_size).header.content_hash,
            "tokenizer_hash": windows.file.header.tokenizer_hash,
            "vocab_size": vocab_size,
            "seq_len": config.seq_len,
            "global_batch_size": config.global_batch_size,
            "segment_documents": config.segment_documents,
            "seed": seed,
        }
        order = grain.MapDataset.range(self.num_records).seed(seed).shuffle()
        first_row, num_rows = _local_rows(config.global_batch_size, process_index, process_count)
        num_batches = sys.maxsize // config.global_batch_size
        batches = _LocalBatches(windows, order, num_batches, config.global_batch_size, first_row, num_rows)
        _require_targets(windows, range(self.num_records))
        self.windows, self._order = windows, order
        self._batches = grain.MapDataset.source(batches)
        self._num_workers = config.num_workers
        self._next_batch = 0
        self._iterator = read(self._batches, 0, self._num_workers)

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def records(self, batch: int) -> list[int]:
        """The records of a global batch, those of all hosts."""
        size = self.fingerprint["global_batch_size"]
        return [int(self._order[i]) for i in range(batch * size, (batch + 1) * size)]

    def state(self) -> dict[str, Any]:
        """The iterator's position, as values that JSON can hold: equal on all hosts."""
        return {"next_batch": self._next_batch, "fingerprint": self.fingerprint}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continues as the iterator whose `state` this is would have.

        Raises:
          DataError: if that iterator had other files or another order, naming what differs, or if `state` is damaged.
        """
        if missing := {"next_batch", "fingerprint"} - set(state):
            raise DataError(f"the saved position of the data is damaged: it has no {' and no '.join(sorted(missing))}")
        next_batch, fingerprint = state["next_batch"], state["fingerprint"]
        if type(next_batch) is not int or not 0 <= next_batch < len(self._batches):
            raise DataError(f"the saved position of the data is damaged: next_batch is {str(next_batch)[:80]}")
        if not isinstance(fingerprint, Mapping):
            raise DataError("the saved position of the data is damaged: its fingerprint is no object")
        check_fingerprint(fingerprint, self.fingerprint)
        self._iterator.close()
        self._next_batch = next_batch
        self._iterator = read(self._batches, self._next_batch, self._num_workers)

    def close(self) -> None:
        """Ends reading processes and threads."""
        self._iterator.close()


class ValidationData:
    """The validation split in order: each `iter` is one pass in which every token is a target once.

    The last window is filled with padding, and the last batch with rows of it (loss weight 0, segment 0), so that all
    hosts yield `len` batches of one shape. With `max_batches`, a pass is an evenly spread subset of as many records as
    fill that many batches (the module says which), or the whole split where it has no more.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        vocab_size: int,
        max_batches: int | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
    ):
        """Opens the split; the other arguments and errors are those of `TrainData`."""
        windows = _open(config, "validation", vocab_size)
        if windows.num_all == 0:
            raise DataError(f"{windows.file.path} holds {len(windows.file)} tokens, too few to predict one")
        self.num_records = windows.num_all
        num_batches = -(-self.num_records // config.global_batch_size)
        num_rows = num_batches * config.global_batch_size
        order: Sequence[int] = range(num_rows)
        if max_batches is not None and max_batches < num_batches:
            num_batches, num_rows = max_batches, max_batches * config.global_batch_size
            order = [(2 * i + 1) * self.num_records // (2 * num_rows) for i in range(num_rows)]
        _require_targets(windows, order)
        self._num_taken = min(num_rows, self.num_records)
        first_row, num_local_rows = _local_rows(config.global_batch_size, process_index, process_count)
        batches = _LocalBatches(windows, order, num_batches, config.global_batch_size, first_row, num_local_rows)
        self._batches = grain.MapDataset.source(batches)
        self._num_workers = config.num_workers

    @property
    def fraction(self) -> float:
        """The part of the split's records that a pass holds."""
        return self._num_taken / self.num_records

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return read(self._batches, 0, self._num_workers)


def describe_coverage(fraction: float) -> str:
    """What a validation loss was measured on, in words, from `ValidationData.fraction`."""
    if fraction == 1:
        return "the whole validation split"
    return f"{100 * fraction:.3g} % of the validation split, evenly spread"


def check_fingerprint(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to continue batches of `saved` with those of `current`.

    Fields that older versions did not save, which are those of `_ADDED_FIELDS`, are compared where they are there.

    Raises:
      DataError: naming every field that differs, with both values.
    """
    names = [name for name in current if name in saved or name not in _ADDED_FIELDS]
    names += [name for name in saved if name not in current]
    differing = [name for name in names if name not in saved or name not in current or saved[name] != current[name]]
    if differing:
        changes = "; ".join(f"{name} was {saved.get(name)!r}, is {current.get(name)!r}" for name in differing)
        raise DataError(f"the saved position belongs to other batches: {changes}; set it back, or start a new run")


def _open(config: DataConfig, split: Split, vocab_size: int) -> Windows | ExampleRows:
    file = _token_file(config, split, vocab_size)
    if file.header.row_tokens is not None:
        return ExampleRows.open(Corpus.open(config.path), split, config)
    return Windows(file, config.seq_len, config.segment_documents, config.first_target_id)


def _token_file(config: DataConfig, split: Split, vocab_size: int) -> TokenFile:
    file = Corpus.open(config.path).token_file(split)
    if file.header.vocab_size != vocab_size:
        raise DataError(
            f"{file.path} has a vocabulary of {file.header.vocab_size}, but the model's is {vocab_size}: set "
            f"model.vocab_size to {file.header.vocab_size}, or data.path to files of that vocabulary"
        )
    return file


def _require_targets(windows: Windows | ExampleRows, order: Sequence[int]) -> None:
    """Refuses records of which no target counts: nothing can be learned from them, and they have no mean loss."""
    if any(windows.has_target(index) for index in order):
        return
    raise DataError(
        f"{windows.file.path}: no target counts in the loss, since none has an id of data.first_target_id "
        f"{windows.first_target_id} or more that does not follow the end of a document; lower data.first_target_id"
    )


def _local_rows(global_batch_size: int, process_index: int | None, process_count: int | None) -> tuple[int, int]:
    """First row and number of rows of this host."""
    process_index = jax.process_index() if process_index is None else process_index
    process_count = jax.process_count() if process_count is None else process_count
    if global_batch_size % process_count:
        raise DataError(
            f"data.global_batch_size {global_batch_size} does not divide among {process_count} hosts: each yields the "
            f"same number of sequences"
        )
    num_rows = global_batch_size // process_count
    return process_index * num_rows, num_rows
