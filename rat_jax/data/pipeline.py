"""Token files to batches: records of fixed length, shuffled without end for training, in order for validation.

Records are windows of documents (`rat_jax.data.windows`) or rows of examples (`rat_jax.data.example_rows`). Global
batch k holds the B records k B .. k B + B - 1 of the order, and of P hosts, host p yields its rows p B/P ..
(p+1) B/P - 1. Neither the number of hosts nor of reading processes changes which records form a batch.

Each of several corpora has an order of its own, shuffled by the seed and the corpus's name, and its next record is
taken where `rat_jax.data.mixture` gives it a row.

The order of validation is 0, 1, 2, ... over all R records, or an evenly spread subset of M of them: the middles of M
equal parts of the split, records floor((2 i + 1) R / (2 M)) for i = 0 .. M - 1.
"""

import dataclasses
import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import jax
import numpy as np

from rat_jax.data import DataError
from rat_jax.data.batch import Batch
from rat_jax.data.corpora import Corpora
from rat_jax.data.corpus import Corpus
from rat_jax.data.mixture import Mixture
from rat_jax.data.readers import read
from rat_jax.data.records import Records, check_vocabulary, open_records
from rat_jax.data.token_file import TokenFile
from rat_jax.data_config import DataConfig

FORMAT_VERSION = 1  # of the order and the content of batches
_ADDED_FIELDS = ("validation_content_hash",)  # of fingerprints


@dataclasses.dataclass(frozen=True)
class _LocalBatches:
    """The rows of every global batch that belong to this host, as a Grain data source: item k is of batch k."""

    sources: tuple[Records, ...]
    orders: tuple[Sequence[int] | grain.MapDataset, ...]  # of the records of each; endless if shuffled
    mixture: Mixture  # of the sources
    num_batches: int
    global_batch_size: int
    first_row: int
    num_rows: int
    batches_ahead: int  # with a batch the system begins to read the one that is so much later

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, k: int) -> Batch:
        records = self._records_of(k)
        self._read_ahead(records)  # those that were not read ahead with an earlier batch
        self._read_ahead(self._records_of(k + self.batches_ahead))
        return self._batch(records)

    def _records_of(self, k: int) -> list[tuple[int, int]]:
        start = k * self.global_batch_size + self.first_row
        return self.records(start, start + self.num_rows) if k < self.num_batches else []

    def _read_ahead(self, records: Sequence[tuple[int, int]]) -> None:
        for source, record in records:
            self.sources[source].read_ahead(record)

    def records(self, start: int, stop: int) -> list[tuple[int, int]]:
        """Source and record of the rows `start` .. `stop` - 1 of all batches and hosts."""
        return [(source, int(self.orders[source][i])) for source, i in self.mixture.rows(start, stop)]

    def _batch(self, records: Sequence[tuple[int, int]]) -> Batch:
        parts, places = [], []
        for source in sorted({source for source, _ in records}):
            mine = [place for place, (other, _) in enumerate(records) if other == source]
            parts.append(self.sources[source].rows([records[place][1] for place in mine]))
            places += mine
        if len(parts) == 1:
            return parts[0]
        back = np.argsort(places)
        return Batch(*(None if part[0] is None else np.concatenate(part)[back] for part in zip(*parts, strict=True)))


class TrainData(Iterator[Batch]):
    """Endless batches of the training splits: every record once an epoch of its corpus, in a new order each time.

    An epoch is all records of a corpus; batches run across its end. Tokens after the last full window are left
    out.
    `state` before a step and `restore` after a restart give the same batches again, on any number of hosts.

    Attributes:
      sources: the records of each corpus, by its name in `data.corpora`; the empty name is that of `data.path`.
      num_records: of all corpora.
      fingerprint: what decides the batches.
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
        """Opens the splits.

        Args:
          config: which files, and how they are cut.
          vocab_size: of the model; the files must have the same.
          seed: of the order.
          process_index: this host among `process_count`; None asks jax.
          process_count: hosts that each yield their rows; None asks jax.

        Raises:
          DataError: if the files are missing, damaged, too short, of several tokenizers or of another vocabulary, or if
            the batch does not divide among the hosts.
        """
        if not 0 <= seed < 2**32:
            raise DataError(f"seed must lie between 0 and 2**32 - 1, got {seed}")
        corpora = Corpora.open(config)
        self.sources: dict[str, Records] = {}
        self.fingerprint: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "tokenizer_hash": corpora.first.tokenizer_hash,
            "vocab_size": vocab_size,
            "seq_len": config.seq_len,
            "global_batch_size": config.global_batch_size,
            "segment_documents": config.segment_documents,
            "seed": seed,
        }
        for name, corpus in corpora.by_name.items():
            records = open_records(corpus, "train", config, vocab_size)
            if records.num_full == 0:
                raise DataError(
                    f"{records.file.path} holds {len(records.file)} tokens, less than one sequence of data.seq_len "
                    f"{config.seq_len} and its next token"
                )
            _require_targets(records, range(records.num_full))
            self.sources[name] = records
            self.fingerprint |= _fingerprint(name, config, records, check_vocabulary(corpus, "validation", vocab_size))
        self.num_records = sum(records.num_full for records in self.sources.values())
        first_row, num_rows = _local_rows(config.global_batch_size, process_index, process_count)
        self._rows = _LocalBatches(
            sources=tuple(self.sources.values()),
            orders=tuple(
                grain.MapDataset.range(records.num_full).seed(_seed_of(seed, name)).shuffle()
                for name, records in self.sources.items()
            ),
            mixture=Mixture(config.weights.values()),
            num_batches=sys.maxsize // config.global_batch_size,
            global_batch_size=config.global_batch_size,
            first_row=first_row,
            num_rows=num_rows,
            batches_ahead=max(1, config.num_workers),
        )
        self._batches = grain.MapDataset.source(self._rows)
        self._num_workers = config.num_workers
        self._next_batch = 0
        self._iterator = read(self._batches, 0, self._num_workers)

    def __next__(self) -> Batch:
        batch = next(self._iterator)
        self._next_batch += 1
        return batch

    def records(self, batch: int) -> list[Any]:
        """The records of a global batch, those of all hosts; of several corpora pairs of a name and a record."""
        size, names = self.fingerprint["global_batch_size"], list(self.sources)
        records = self._rows.records(batch * size, (batch + 1) * size)
        return [record if names == [""] else [names[source], record] for source, record in records]

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

    Attributes:
      num_records: of the split.
      num_taken: of them, in a pass.
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
        """Opens the split of the one corpus that `config.path` names; other arguments and errors as of `TrainData`."""
        records = open_records(Corpus.open(config.path), "validation", config, vocab_size)
        if records.num_all == 0:
            raise DataError(f"{records.file.path} holds {len(records.file)} tokens, too few to predict one")
        self.num_records = records.num_all
        num_batches = -(-self.num_records // config.global_batch_size)
        num_rows = num_batches * config.global_batch_size
        order: Sequence[int] = range(num_rows)
        if max_batches is not None and max_batches < num_batches:
            num_batches, num_rows = max_batches, max_batches * config.global_batch_size
            order = [(2 * i + 1) * self.num_records // (2 * num_rows) for i in range(num_rows)]
        _require_targets(records, order)
        self.num_taken = min(num_rows, self.num_records)
        first_row, num_local_rows = _local_rows(config.global_batch_size, process_index, process_count)
        batches = _LocalBatches(
            sources=(records,),
            orders=(order,),
            mixture=Mixture([1.0]),
            num_batches=num_batches,
            global_batch_size=config.global_batch_size,
            first_row=first_row,
            num_rows=num_local_rows,
            batches_ahead=max(1, config.num_workers),
        )
        self._batches = grain.MapDataset.source(batches)
        self._num_workers = config.num_workers

    @property
    def fraction(self) -> float:
        """The part of the split's records that a pass holds."""
        return self.num_taken / self.num_records

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


def _fingerprint(name: str, config: DataConfig, records: Records, validation: TokenFile) -> dict[str, Any]:
    """What decides the batches of one corpus; that of `data.path` has no weight and no name."""
    values = {
        "num_tokens": len(records.file),
        "content_hash": records.file.header.content_hash,
        "validation_content_hash": validation.header.content_hash,
    }
    if records.file.header.packed_row_tokens is not None:
        values["packed"] = True
    if name:
        values["weight"] = config.weights[name]
    return {f"corpora.{name}.{field}" if name else field: value for field, value in values.items()}


def _seed_of(seed: int, name: str) -> int:
    """Of the order of a corpus. Another corpus beside it does not change it."""
    if not name:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "little")


def _require_targets(records: Records, order: Sequence[int]) -> None:
    """Refuses records of which no target counts: nothing can be learned from them, and they have no mean loss."""
    if any(records.has_target(index) for index in order):
        return
    raise DataError(
        f"{records.file.path}: no target counts in the loss, since none has an id of data.first_target_id "
        f"{records.first_target_id} or more that does not follow the end of a document; lower data.first_target_id"
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
