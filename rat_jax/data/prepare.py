"""Turns text into token files.

  python -m rat_jax.data.prepare --source python-stdlib --tokenizer bpe:2048 --out data/python-stdlib-bpe2048

The result is a folder (`rat_jax.data.corpus` describes it) that is either complete or not there: all is written into a
folder beside it that takes its name at the end. The same command run again finds its work done; one that was stopped
starts from the beginning.
"""

import argparse
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import platform
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np
import tqdm

from rat_jax.data import DataError
from rat_jax.data.collection import Collection
from rat_jax.data.corpus import METADATA_FILE, SPLITS, Corpus, Split, Statistics, byte_entropy
from rat_jax.data.document import ReadOptions
from rat_jax.data.encoding import Encoder, encode
from rat_jax.data.new_folder import new_folder
from rat_jax.data.sources import absolute_source, parse_source
from rat_jax.data.token_file import Header, TokenFileWriter, wrap_flat_file
from rat_jax.data.tokenizer import Tokenizer, train_bpe
from rat_jax.data.tokenizer_choice import absolute_tokenizer, is_path, parse_tokenizer
from rat_jax.files import system_errors
from rat_jax.paths import local_path
from rat_jax.program import FlagError, exit_code

_RELEASE_BIN = "release-bin:"

_BLOCK_TOKENS = 1 << 24
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}

_SOURCES = """\
sources (--source, --validation_source; one or several values, the flag once or several times):
  PATH                       a file, all files below a folder, or a glob pattern in quotes, each file by its ending:
                             .jsonl .ndjson JSON lines, .json the same or an array of objects, .parquet, others text
  text:PATH                  the same, all of it plain text
  jsonl:PATH  parquet:PATH   the same, but below a folder those of that kind only
  python-stdlib              the standard library of this Python (*.py, its tests left out)
  hf:NAME[:CONFIG[:SPLIT]]   a Hugging Face data set (needs the package `datasets`); text in the column --field
  recall:COUNT               generated documents of an associative recall task, for --tokenizer ids:46:0
  release-bin:FILE           flat uint16 token ids of the PyTorch release, used where they are; give the training file
                             as --source and the validation file as --validation_source
  .gz, .bz2, .xz and .zst are unpacked. Text is UTF-8, or UTF-16 or UTF-32 with its byte order mark. Links are
  followed; hidden files are left out.
documents and splits:
  A document is a text file, or what lies between two --document_separator in it, or a record of the other kinds.
  Without --validation_source the hash of a document decides its split. If a split would have none, as with one single
  document, each document is cut, and its tail is for validation.
tokenizers (--tokenizer):
  bytes                      UTF-8 bytes and the end of a document: 257 ids
  bpe:SIZE                   a byte-level BPE of SIZE ids, trained on the training documents, for which words of more
                             than 1,000 characters are cut
  PATH                       a Hugging Face tokenizer.json, a SentencePiece .model (LLaMA-2: the RAT paper's recipe), or
                             the folder of a corpus that was prepared before
  ids:VOCAB_SIZE:EOS_ID      for release-bin without its tokenizer, and for text that is numbers: "12 7 931"

What is stopped leaves nothing behind, and starts from the beginning when the command is given again.
"""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What decides the tokens. A finished folder is used again only for equal settings."""

    source: tuple[str, ...]
    validation_source: tuple[str, ...]  # empty: validation documents are taken from `source`
    validation_fraction: float  # of the documents; those whose content hash falls below it
    tokenizer: str
    eos_token: str | None
    field: str
    document_separator: str | None
    invalid_utf8: str

    def read_options(self) -> ReadOptions:
        return ReadOptions(self.field, self.document_separator, self.invalid_utf8)

    @property
    def is_release(self) -> bool:
        """Whether the sources are token files of the PyTorch release."""
        return any(spec.startswith(_RELEASE_BIN) for spec in self.source + self.validation_source)

    def absolute(self) -> "Settings":
        """The same with absolute paths."""
        return dataclasses.replace(
            self,
            source=tuple(map(absolute_source, self.source)),
            validation_source=tuple(map(absolute_source, self.validation_source)),
            tokenizer=absolute_tokenizer(self.tokenizer),
        )

    def as_json(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        return values | {name: list(values[name]) for name in ("source", "validation_source")}


def prepare(settings: Settings, out: pathlib.Path, *, num_workers: int, overwrite: bool) -> Corpus:
    """Writes the prepared corpus `out`, or finds it finished.

    Args:
      settings: of the corpus.
      out: the folder; it may be missing or empty, or hold a corpus of the same settings.
      num_workers: processes that encode; 0 encodes in this one.
      overwrite: replace a corpus of other settings. Folders that hold anything else are never replaced.

    Raises:
      RatJaxError: naming what is wrong; `out` is then as it was.
    """
    settings = settings.absolute()
    _check(settings)
    if num_workers < 0:
        raise DataError(f"--num_workers must be 0 or more, got {num_workers}")
    out = local_path(out, "--out")
    with system_errors(out, "read"):
        out = _place(out)
        is_there = _is_there(out)
        if is_there and not (out / METADATA_FILE).is_file():
            raise DataError(f"{out} exists and is not a prepared corpus; it is left alone: choose another --out")
    if is_there and not overwrite:
        return _finished(settings, out)
    collection = None if settings.is_release else _collection(settings)
    with system_errors(out, "written"), new_folder(out) as folder:
        corpus = _encode(settings, collection, folder, num_workers) if collection else _wrap_release(settings, folder)
        corpus.write_metadata()
        if not is_there and _is_there(out):
            raise DataError(f"{out} was made by another program in the meantime; it is left alone")
    return Corpus.open(out)


def verify(corpus: Corpus) -> None:
    """Reads all tokens of a corpus and compares them with what was written.

    Raises:
      DataError: naming the file that was changed.
    """
    corpus.tokenizer()
    for split in SPLITS:
        file = corpus.token_file(split)
        digest = hashlib.sha256()
        num_ends = 0
        with tqdm.tqdm(unit="tok", unit_scale=True, desc=f"verifying {split}", total=len(file)) as bar:
            for start in range(0, len(file), _BLOCK_TOKENS):
                block = file.tokens[start : start + _BLOCK_TOKENS]
                digest.update(block.tobytes())
                num_ends += int((block == file.header.eos_id).sum())
                bar.update(len(block))
        is_unended = len(file) > 0 and file.tokens[-1] != file.header.eos_id  # a file of the release may be
        if digest.hexdigest() != file.header.content_hash or num_ends + is_unended != file.header.num_documents:
            raise DataError(f"{file.path} was changed after it was written (its hash differs): prepare it again")


def _place(out: pathlib.Path) -> pathlib.Path:
    """The folder itself, where `out` is a link to it; it must be one that can take its name by renaming."""
    if out.is_symlink() and not out.exists():
        raise DataError(
            f"--out {out} is a link to {os.readlink(out)}, which does not exist: make it, or remove the link"
        )
    place = pathlib.Path(os.path.realpath(out)) if out.is_symlink() else out
    above = next(parent for parent in place.parents if parent.exists())
    if not above.is_dir():
        raise DataError(f"--out {out} lies below {above}, which is a file: choose another place")
    if os.path.ismount(place):
        raise DataError(f"--out {out} is a mount point, which no folder can replace: name a folder in it")
    return place


def _is_there(out: pathlib.Path) -> bool:
    """Whether something is at `out` that is more than an empty folder."""
    return os.path.lexists(out) and (not out.is_dir() or any(out.iterdir()))


def _check(settings: Settings) -> None:
    specs = settings.source + settings.validation_source
    if not settings.source:
        raise DataError("--source is missing")
    if settings.is_release and not (
        len(settings.source) == len(settings.validation_source) == 1 and all(s.startswith(_RELEASE_BIN) for s in specs)
    ):
        raise DataError(
            "release-bin: give one training file as --source and one validation file as --validation_source"
        )
    if settings.document_separator == "":
        raise DataError("--document_separator is empty; leave it out where a file is one document")
    if settings.validation_source:
        return
    if not 0 < settings.validation_fraction < 1:
        raise DataError(f"--validation_fraction must lie between 0 and 1, got {settings.validation_fraction}")


def _finished(settings: Settings, out: pathlib.Path) -> Corpus:
    corpus = Corpus.open(out)
    wanted = settings.as_json()
    there = _with_absolute_paths(corpus.settings)
    differing = [name for name in wanted if there.get(name) != wanted[name]]
    if differing:
        changes = "; ".join(f"{name}: {there.get(name)!r} there, {wanted[name]!r} now" for name in differing)
        raise DataError(f"{out} was prepared with other settings ({changes}); choose another --out, or --overwrite")
    for split in SPLITS:
        corpus.token_file(split)
    tokenizer = corpus.tokenizer()
    if is_path(settings.tokenizer) and parse_tokenizer(settings.tokenizer, settings.eos_token).hash != tokenizer.hash:
        raise DataError(
            f"{out} was prepared with what {settings.tokenizer} held before it was changed; choose another --out, or "
            f"--overwrite"
        )
    print(f"{out}: already prepared")
    return corpus


def _with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a corpus; earlier versions wrote paths as they were given."""
    changed = dict(settings)
    for name in ("source", "validation_source"):
        changed[name] = [absolute_source(str(spec)) for spec in settings.get(name) or []]
    if isinstance(settings.get("tokenizer"), str):
        changed["tokenizer"] = absolute_tokenizer(settings["tokenizer"])
    return changed


def _collection(settings: Settings) -> Collection:
    """The documents of the sources, which are looked at as far as is needed to know that the work can be done."""
    options = settings.read_options()
    collection = Collection(
        sources=[parse_source(spec, options) for spec in settings.source],
        validation_sources=[parse_source(spec, options) for spec in settings.validation_source],
        validation_fraction=settings.validation_fraction,
    )
    for line in collection.describe():
        print(line.encode(errors="backslashreplace").decode())  # names of files need not be UTF-8
    return collection


def _wrap_release(settings: Settings, folder: pathlib.Path) -> Corpus:
    if settings.tokenizer.startswith("bpe:"):
        raise DataError("release-bin holds token ids: name the tokenizer that made them, or ids:VOCAB_SIZE:EOS_ID")
    tokenizer = parse_tokenizer(settings.tokenizer, settings.eos_token)
    tokenizer.save(folder)
    headers: dict[Split, Header] = {}
    for split, spec in zip(SPLITS, settings.source + settings.validation_source, strict=True):
        path = pathlib.Path(spec.removeprefix(_RELEASE_BIN))
        with tqdm.tqdm(unit="tok", unit_scale=True, desc=f"checking {path.name}") as bar:
            headers[split] = wrap_flat_file(folder / f"{split}.bin", path, tokenizer, bar.update)
    return _corpus(settings, folder, tokenizer, headers, None)


def _encode(settings: Settings, collection: Collection, folder: pathlib.Path, num_workers: int) -> Corpus:
    tokenizer = parse_tokenizer(settings.tokenizer, settings.eos_token)
    collection.check()
    warned = collection.settle() and _warn_of_separator(settings, collection)
    if collection.empty_split:
        print(
            f"no whole document falls into the {collection.empty_split} split at --validation_fraction "
            f"{settings.validation_fraction}: the tail of each document becomes validation text"
        )
    if isinstance(tokenizer, int):
        tokenizer = train_bpe(tqdm.tqdm(collection.train_texts(), unit="doc", desc="training the tokenizer"), tokenizer)
    tokenizer.save(folder)
    encoder = Encoder(tokenizer, settings.validation_fraction)
    writers = {split: TokenFileWriter(folder / f"{split}.bin", tokenizer) for split in SPLITS}
    byte_counts = {split: np.zeros(256, np.int64) for split in SPLITS}
    with tqdm.tqdm(unit="doc", desc="encoding", total=collection.num_documents) as bar:
        for part in encode(collection.documents(), encoder, num_workers=num_workers):
            writers[part.split].append(part.ids, part.num_documents)
            byte_counts[part.split] += part.byte_counts
            bar.set_postfix(tokens=f"{sum(writer.num_tokens for writer in writers.values()):,}", refresh=False)
            bar.update(part.num_documents)
    headers = {split: writer.close() for split, writer in writers.items()}
    if not warned:
        _warn_of_separator(settings, collection)
    return _corpus(settings, folder, tokenizer, headers, byte_counts)


def _warn_of_separator(settings: Settings, collection: Collection) -> bool:
    """Says, after all documents were read, that a separator was of no use; returns whether it did."""
    if settings.document_separator is None or collection.separator_occurs:
        return False
    print(
        f"warning: --document_separator {settings.document_separator!r} occurs in no text file "
        f"({collection.num_separated:,} read); each of them is one document",
        file=sys.stderr,
    )
    return True


def _corpus(
    settings: Settings,
    folder: pathlib.Path,
    tokenizer: Tokenizer,
    headers: dict[Split, Header],
    byte_counts: dict[Split, np.ndarray] | None,
) -> Corpus:
    def statistics(parts: Sequence[Split]) -> Statistics:
        counts = None if byte_counts is None else sum(byte_counts[split] for split in parts)
        return Statistics(
            num_documents=sum(headers[split].num_documents for split in parts),
            num_tokens=sum(headers[split].num_tokens for split in parts),
            num_bytes=None if counts is None else int(counts.sum()),
            byte_entropy_nats=None if counts is None else byte_entropy(counts),
        )

    return Corpus(
        path=folder,
        settings=settings.as_json(),
        python_version=platform.python_version(),
        tokenizer_hash=tokenizer.hash,
        splits={split: statistics([split]) for split in SPLITS},
        total=statistics(SPLITS),
    )


def _report(corpus: Corpus) -> None:
    for name, part in [*corpus.splits.items(), ("total", corpus.total)]:
        line = f"{name:<10} {part.num_documents:>12,} documents {part.num_tokens:>16,} tokens"
        if part.num_bytes is not None:
            line += (
                f"  {part.bytes_per_token:.3f} bytes/token  byte-unigram entropy {part.byte_entropy_nats:.4f} nats/byte"
            )
        print(line)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise FlagError(f"{message}; --help lists the flags")


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m rat_jax.data.prepare",
        description="Turns text into token files.",
        epilog=_SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sources = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument("--source", **sources, help="where the text comes from, see below")
    parser.add_argument("--tokenizer", help="see below")
    parser.add_argument("--out", required=True, help="the folder to make")
    parser.add_argument("--validation_source", **sources, help="validation text of its own")
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="of the documents (default 0.05)")
    parser.add_argument(
        "--field", default="text", help="key or column that holds the text, as text (default) or meta.text"
    )
    parser.add_argument(
        "--document_separator",
        type=_unescape,
        help=r"cut text files into documents here, as '\n\n'; else a file is one",
    )
    parser.add_argument("--eos_token", help="the token that ends a document, if the tokenizer's file does not say it")
    parser.add_argument("--invalid_utf8", choices=("refuse", "replace"), default="refuse", help="(default refuse)")
    parser.add_argument("--num_workers", type=int, default=_num_cores(), help="processes (default one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus prepared with other settings")
    parser.add_argument("--verify", action="store_true", help="read the finished corpus again and compare its hashes")
    flags = parser.parse_args(arguments)
    for name in ("source", "tokenizer"):
        if not getattr(flags, name) and not flags.verify:
            parser.error(f"--{name} is missing")
    if flags.verify and bool(flags.source) != bool(flags.tokenizer):
        parser.error("--verify stands alone with --out, or beside all flags of a corpus to prepare")
    return flags


def _unescape(text: str) -> str:
    """The characters that a shell passes on as they are typed in quotes: `\\n`, `\\r`, `\\t` and `\\\\`."""

    def character(escape: re.Match[str]) -> str:
        if escape[0] not in _ESCAPES:
            raise argparse.ArgumentTypeError(f"{escape[0]!r} is none of \\n, \\r, \\t and \\\\ (a backslash)")
        return _ESCAPES[escape[0]]

    return re.sub(r"\\.?", character, text, flags=re.DOTALL)


def _num_cores() -> int:
    """Cores that this process may use; a scheduler may have given it fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Inside the block SIGTERM does what Ctrl-C does, so that what was begun is removed."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    with _termination_interrupts():
        return exit_code(lambda: _run(_parse(arguments)))


def _run(flags: argparse.Namespace) -> None:
    if flags.source:
        settings = Settings(
            source=tuple(flags.source),
            validation_source=tuple(flags.validation_source),
            validation_fraction=flags.validation_fraction,
            tokenizer=flags.tokenizer,
            eos_token=flags.eos_token,
            field=flags.field,
            document_separator=flags.document_separator,
            invalid_utf8=flags.invalid_utf8,
        )
        corpus = prepare(settings, flags.out, num_workers=flags.num_workers, overwrite=flags.overwrite)
    else:
        corpus = Corpus.open(local_path(flags.out, "--out"))
    _report(corpus)
    if flags.verify:
        verify(corpus)
        print(f"{corpus.path}: verified, every token is as it was written")


if __name__ == "__main__":
    sys.exit(main())
