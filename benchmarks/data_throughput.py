"""How fast batches are read on the host: tokens a second, and the share of a core that a training of 8 cards takes.

  python benchmarks/data_throughput.py --gigabytes 30 --folder data

Corpora of random ids are written to a temporary folder below `--folder`: 70 % of `--gigabytes` as one stream, 10 % as
another, 20 % in packed rows. Batches of `--batch_size` rows of `--seq_len` tokens are then read as `train.py` reads
them, in one process: of the first corpus alone, of the packed one, and of a mixture of all three.

  cold            pages of the files dropped from memory before; blocks are compared with their digests
  cold, in turn   the same without reading ahead: each row waits for the disk alone
  warm            the same batches anew, in memory; blocks are compared once more
  again           the same batches by the same reader, which knows the blocks

CPU time is of all threads, in the system too. The share of a core is at `--rate` tokens a second. What the hypervisor
of a virtual machine keeps of its disk in its own memory cannot be dropped from here: give more than that has.
"""

import argparse
import contextlib
import os
import pathlib
import platform
import sys
import tempfile
import time
from typing import NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from rat_jax import program
from rat_jax.data.corpus import SPLITS, Corpus, Statistics
from rat_jax.data.integrity import CheckedReader
from rat_jax.data.packed_rows import PackedWriter
from rat_jax.data.pipeline import TrainData
from rat_jax.data.token_file import TokenFileWriter
from rat_jax.data.tokenizer import IdTokenizer
from rat_jax.data_config import CorpusConfig, DataConfig
from rat_jax.paths import local_path

TOKENIZER = IdTokenizer(vocab_size=32_000, eos_id=2)
DOCUMENT_TOKENS = 1000  # on average
PIECE_TOKENS = 1 << 24
SHARES = {"first": 0.7, "second": 0.1, "packed": 0.2}


class Reading(NamedTuple):
    """Of some batches."""

    num_tokens: int
    secs: float
    cpu_secs: float


def write_corpus(path: pathlib.Path, num_tokens: int, packed_seq_len: int | None) -> None:
    """A prepared corpus of random documents; what they are costs no reader anything."""
    path.mkdir()
    TOKENIZER.save(path)
    generator, headers = np.random.default_rng(0), {}
    for split in SPLITS:
        file = path / f"{split}.bin"
        is_packed = packed_seq_len is not None and split == "train"
        writer = PackedWriter(file, TOKENIZER, packed_seq_len) if is_packed else TokenFileWriter(file, TOKENIZER)
        left = num_tokens if split == "train" else 10**5
        while left > 0:
            ids = generator.integers(3, TOKENIZER.vocab_size, min(PIECE_TOKENS, left), dtype=np.uint16)
            ids[generator.integers(0, len(ids), len(ids) // DOCUMENT_TOKENS)] = TOKENIZER.eos_id
            ids[-1] = TOKENIZER.eos_id
            writer.append(ids, int((ids == TOKENIZER.eos_id).sum()))
            left -= len(ids)
        headers[split] = writer.close()
    splits = {split: Statistics(each.num_documents, each.num_tokens, None, None) for split, each in headers.items()}
    counts = [(part.num_documents, part.num_tokens) for part in splits.values()]
    total = Statistics(*map(sum, zip(*counts, strict=True)), None, None)
    Corpus(path, {}, platform.python_version(), TOKENIZER.hash, splits, total).write_metadata()


def drop_pages(path: pathlib.Path) -> None:
    """Takes a file out of memory."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(data: TrainData, num_batches: int) -> Reading:
    """The next batches."""
    start, cpu_start, num_tokens = time.perf_counter(), time.process_time(), 0
    for _ in range(num_batches):
        num_tokens += next(data).tokens.size
    return Reading(num_tokens, time.perf_counter() - start, time.process_time() - cpu_start)


def readings(config: DataConfig, num_batches: int) -> dict[str, Reading]:
    """What the docstring of this program names, each from the same first batch but for the second cold one."""

    def opened() -> TrainData:
        return TrainData(config, vocab_size=TOKENIZER.vocab_size, seed=0)

    def started(data: TrainData, batch: int) -> TrainData:
        data.restore(data.state() | {"next_batch": batch})
        return data

    def drop() -> None:
        for path in config.paths.values():
            drop_pages(pathlib.Path(path) / "train.bin")

    found = {}
    for name, patch, first in (
        ("cold", contextlib.nullcontext(), 0),
        ("cold, in turn", mock.patch.object(CheckedReader, "read_ahead", lambda *arguments: None), num_batches),
    ):
        drop()
        with patch, contextlib.closing(started(opened(), first)) as data:
            found[name] = read(data, num_batches)
    with contextlib.closing(opened()) as data:
        read(data, num_batches)
    with contextlib.closing(opened()) as data:
        found["warm"] = read(data, num_batches)
        found["again"] = read(started(data, 0), num_batches)
    return found


def main() -> None:
    """Prints the table."""
    parser = program.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of token ids, two bytes each")
    parser.add_argument("--folder", default=None, help="where they are written; left out: the system's own")
    parser.add_argument("--seq_len", type=int, default=4096)
    parser.add_argument("--batch_size", type=int, default=128, help="rows of a batch on this host")
    parser.add_argument("--num_batches", type=int, default=20, help="of each measurement")
    parser.add_argument("--rate", type=float, default=520_000.0, help="tokens a second that devices take")
    flags = parser.parse_args()

    parent = None if flags.folder is None else local_path(flags.folder, "--folder")
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        paths = {name: str(pathlib.Path(folder) / name) for name in SHARES}
        for name, path in paths.items():
            start = time.perf_counter()
            num_tokens = int(flags.gigabytes * 1e9 * SHARES[name]) // 2
            write_corpus(pathlib.Path(path), num_tokens, flags.seq_len if name == "packed" else None)
            secs = time.perf_counter() - start
            print(
                f"{name}: {num_tokens:,} tokens written in {secs:.0f} s, {num_tokens / secs:,.0f} a second", flush=True
            )
        shape = {"seq_len": flags.seq_len, "global_batch_size": flags.batch_size}
        mixture = {name: CorpusConfig(path, SHARES[name]) for name, path in paths.items()}
        print(f"\n| corpora | documents | pages | tokens/s | core at {flags.rate / 1e6:.2f} M tokens/s |")
        print("|---|---|---|--:|--:|")
        for kind, corpora, segment_documents in (
            ("one", {"path": paths["first"]}, False),
            ("one", {"path": paths["first"]}, True),
            ("packed", {"path": paths["packed"]}, True),
            ("mixture of three", {"corpora": mixture}, True),
        ):
            config = DataConfig(**corpora, **shape, segment_documents=segment_documents)
            for pages, reading in readings(config, flags.num_batches).items():
                core = flags.rate * reading.cpu_secs / reading.num_tokens
                print(
                    f"| {kind} | {'apart' if segment_documents else 'as one'} | {pages} | "
                    f"{reading.num_tokens / reading.secs:,.0f} | {core:.1%} |",
                    flush=True,
                )


if __name__ == "__main__":
    sys.exit(program.exit_code(main))
