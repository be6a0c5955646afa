"""Turns text into token files.

  python -m rat_jax.data.prepare --source python-stdlib --tokenizer bpe:2048 --out data/python-stdlib-bpe2048

The result is a folder (`rat_jax.data.corpus` describes it) that is either complete or not there: all is written into a
folder beside it that takes its name at the end. The same command run again finds its work done.
"""

import argparse
import dataclasses
import os
import pathlib
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm

from rat_jax.data import DataError
from rat_jax.data.corpus import METADATA_FILE, SPLITS, Corpus, Split, Statistics, byte_entropy
from rat_jax.data.encoding import Encoder, encode, split_of
from rat_jax.data.new_folder import new_folder
from rat_jax.data.sources import ReadOptions, parse_source
from rat_jax.data.token_file import Header, TokenFileWriter, wrap_flat_file
from rat_jax.data.tokenizer import INFO_FILE, ByteTokenizer, IdTokenizer, Tokenizer, train_bpe
from rat_jax.data.tokenizer_files import read_tokenizer
from rat_jax.data.workers import check_main

_RELEASE_BIN = "release-bin:"

_SOURCES = """\
sources (--source, --validation_source; may be given several times):
  python-stdlib              the standard library of this Python (*.py, its tests left out)
  text:PATH                  a text file, all files below a folder, or a glob pattern
  jsonl:PATH                 JSON lines (.gz too): a file, *.json* below a folder, or a pattern; text under --field
  parquet:PATH               Parquet: a file, *.parquet below a folder, or a pattern; text in the column --field
  hf:NAME[:CONFIG[:SPLIT]]   a Hugging Face data set (needs the package `datasets`); text in the column --field
  recall:COUNT               generated documents of an associative recall task, for --tokenizer ids:46:0
  PATH                       one of the above by its ending; text if it is none
  release-bin:FILE           flat uint16 token ids of the PyTorch release, used where they are; give the training file
                             as --source and the validation file as --validation_source
tokenizers (--tokenizer):
  bytes                      UTF-8 bytes and the end of a document: 257 ids
  bpe:SIZE                   a byte-level BPE of SIZE ids, trained on the training documents
  PATH                       a Hugging Face tokenizer.json, a SentencePiece .model (LLaMA-2: the RAT paper's recipe), or
                             the folder of a corpus that was prepared before
  ids:VOCAB_SIZE:EOS_ID      for release-bin without its tokenizer, and for text that is numbers: "12 7 931"
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
      DataError: naming what is wrong; `out` is then as it was.
    """
    check_main(num_workers)
    _check(settings)
    if num_workers < 0:
        raise DataError(f"--num_workers must be 0 or more, got {num_workers}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        if not (out / METADATA_FILE).is_file():
            raise DataError(f"{out} exists and is not a prepared corpus; it is left alone: choose another --out")
        if not overwrite:
            return _finished(settings, out)
    with new_folder(out) as folder:
        if any(spec.startswith(_RELEASE_BIN) for spec in settings.source + settings.validation_source):
            corpus = _wrap_release(settings, folder)
        else:
            corpus = _encode(settings, folder, num_workers)
        corpus.write_metadata()
    return Corpus.open(out)


def _check(settings: Settings) -> None:
    specs = settings.source + settings.validation_source
    if any(spec.startswith(_RELEASE_BIN) for spec in specs) and not (
        len(settings.source) == len(settings.validation_source) == 1 and all(s.startswith(_RELEASE_BIN) for s in specs)
    ):
        raise DataError(
            "release-bin: give one training file as --source and one validation file as --validation_source"
        )
    if settings.validation_source:
        return
    if not 0 < settings.validation_fraction < 1:
        raise DataError(f"--validation_fraction must lie between 0 and 1, got {settings.validation_fraction}")


def _finished(settings: Settings, out: pathlib.Path) -> Corpus:
    corpus = Corpus.open(out)
    wanted = settings.as_json()
    differing = [name for name in wanted if corpus.settings.get(name) != wanted[name]]
    if differing:
        changes = "; ".join(f"{name}: {corpus.settings.get(name)!r} there, {wanted[name]!r} now" for name in differing)
        raise DataError(f"{out} was prepared with other settings ({changes}); choose another --out, or --overwrite")
    for split in SPLITS:
        corpus.token_file(split)
    tokenizer = corpus.tokenizer()
    if _is_path(settings.tokenizer) and _make_tokenizer(settings).hash != tokenizer.hash:
        raise DataError(
            f"{out} was prepared with what {settings.tokenizer} held before it was changed; choose another --out, or "
            f"--overwrite"
        )
    print(f"{out}: already prepared")
    return corpus


def _wrap_release(settings: Settings, folder: pathlib.Path) -> Corpus:
    if settings.tokenizer.startswith("bpe:"):
        raise DataError("release-bin holds token ids: name the tokenizer that made them, or ids:VOCAB_SIZE:EOS_ID")
    tokenizer = _make_tokenizer(settings)
    tokenizer.save(folder)
    headers: dict[Split, Header] = {}
    for split, spec in zip(SPLITS, settings.source + settings.validation_source, strict=True):
        path = pathlib.Path(spec.removeprefix(_RELEASE_BIN)).expanduser()
        with tqdm.tqdm(unit="tok", unit_scale=True, desc=f"checking {path.name}") as bar:
            headers[split] = wrap_flat_file(folder / f"{split}.bin", path, tokenizer, bar.update)
    return _corpus(settings, folder, tokenizer, headers, None)


def _encode(settings: Settings, folder: pathlib.Path, num_workers: int) -> Corpus:
    tokenizer = _make_tokenizer(settings)
    tokenizer.save(folder)
    encoder = Encoder(tokenizer, settings.validation_fraction)
    writers = {split: TokenFileWriter(folder / f"{split}.bin", tokenizer) for split in SPLITS}
    byte_counts = {split: np.zeros(256, np.int64) for split in SPLITS}
    with tqdm.tqdm(unit="doc", desc="encoding", total=_num_documents(settings)) as bar:
        for part in encode(_documents(settings), encoder, num_workers=num_workers):
            writers[part.split].append(part.ids, part.num_documents)
            byte_counts[part.split] += part.byte_counts
            bar.set_postfix(tokens=f"{sum(writer.num_tokens for writer in writers.values()):,}", refresh=False)
            bar.update(part.num_documents)
    headers = {split: writer.close() for split, writer in writers.items()}
    _check_not_empty(settings, headers)
    return _corpus(settings, folder, tokenizer, headers, byte_counts)


def _check_not_empty(settings: Settings, headers: dict[Split, Header]) -> None:
    counts = {split: headers[split].num_documents for split in SPLITS}
    if not any(counts.values()):
        raise DataError(f"empty corpus: {', '.join(settings.source)} holds no text")
    for split in SPLITS:
        if counts[split] == 0 and settings.validation_source:
            option = "--source" if split == "train" else "--validation_source"
            raise DataError(f"no documents in the {split} split: {option} holds no text")
        if counts[split] == 0:
            raise DataError(
                f"no documents in the {split} split: {sum(counts.values())} documents at --validation_fraction "
                f"{settings.validation_fraction}; change the fraction, cut files into documents with "
                f"--document_separator, or give a --validation_source"
            )


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


def _make_tokenizer(settings: Settings) -> Tokenizer:
    if _is_path(settings.tokenizer):
        return read_tokenizer(settings.tokenizer, settings.eos_token)
    kind, *numbers = settings.tokenizer.split(":")
    if not all(number.isdecimal() for number in numbers):
        raise DataError(f"--tokenizer {settings.tokenizer}: what stands after a colon must be a number")
    match kind, [int(number) for number in numbers]:
        case "bytes", []:
            return ByteTokenizer()
        case "bpe", [size]:
            return train_bpe(tqdm.tqdm(_train_texts(settings), unit="doc", desc="training the tokenizer"), size)
        case "ids", [vocab_size, eos_id]:
            return IdTokenizer(vocab_size, eos_id)
    raise DataError(
        f"--tokenizer {settings.tokenizer}: expected bytes, bpe:SIZE, ids:VOCAB_SIZE:EOS_ID, a tokenizer.json, a "
        f"SentencePiece .model file or the folder of a prepared corpus"
    )


def _is_path(tokenizer: str) -> bool:
    return tokenizer.endswith((".json", ".model")) or (pathlib.Path(tokenizer) / INFO_FILE).is_file()


def _train_texts(settings: Settings) -> Iterator[str]:
    for split, text in _documents(settings):
        if (split or split_of(text, settings.validation_fraction)) == "train":
            yield text


def _documents(settings: Settings) -> Iterator[tuple[Split | None, str]]:
    """All texts that are not empty, with their split where the source decides it."""
    options = settings.read_options()
    pairs = [("train" if settings.validation_source else None, spec) for spec in settings.source]
    pairs += [("validation", spec) for spec in settings.validation_source]
    for split, spec in pairs:
        for document in parse_source(spec, options).documents():
            if document.text:
                yield split, document.text


def _num_documents(settings: Settings) -> int | None:
    options = settings.read_options()
    counts = [parse_source(spec, options).num_documents for spec in settings.source + settings.validation_source]
    return None if None in counts else sum(counts)


def _report(corpus: Corpus) -> None:
    for name, part in [*corpus.splits.items(), ("total", corpus.total)]:
        line = f"{name:<10} {part.num_documents:>12,} documents {part.num_tokens:>16,} tokens"
        if part.num_bytes is not None:
            line += (
                f"  {part.bytes_per_token:.3f} bytes/token  byte-unigram entropy {part.byte_entropy_nats:.4f} nats/byte"
            )
        print(line)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m rat_jax.data.prepare",
        description="Turns text into token files.",
        epilog=_SOURCES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--source", action="append", required=True, help="where the text comes from, see below")
    parser.add_argument("--tokenizer", required=True, help="see below")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="the folder to make")
    parser.add_argument("--validation_source", action="append", default=[], help="validation text of its own")
    parser.add_argument("--validation_fraction", type=float, default=0.05, help="of the documents (default 0.05)")
    parser.add_argument("--field", default="text", help="key or column that holds the text (default text)")
    parser.add_argument("--document_separator", help="cut text files into documents here; else a file is a document")
    parser.add_argument("--eos_token", help="the token that ends a document, if the tokenizer's file does not say it")
    parser.add_argument("--invalid_utf8", choices=("refuse", "replace"), default="refuse", help="(default refuse)")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="processes (default one a core)")
    parser.add_argument("--overwrite", action="store_true", help="replace a corpus prepared with other settings")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    flags = _parse(arguments)
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
    try:
        _report(prepare(settings, flags.out, num_workers=flags.num_workers, overwrite=flags.overwrite))
    except DataError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
