"""Turns text into token files.

  python -m rat_jax.data.prepare --source python-stdlib --tokenizer bpe:2048 --out data/python-stdlib-bpe2048

The result is a folder (`rat_jax.data.corpus` describes it) that is either complete or not there: all is written into a
folder beside it that takes its name at the end. The same command run again finds its work done; one that was stopped
starts from the beginning.
"""

import argparse
import contextlib
import os
import pathlib
import platform
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from rat_jax.data import DataError
from rat_jax.data.chat_template import ChatTemplate
from rat_jax.data.collection import Collection
from rat_jax.data.corpus import METADATA_FILE, SPLITS, Corpus, Split, Statistics, byte_entropy
from rat_jax.data.encoding import Encoder, encode
from rat_jax.data.example_collection import ExampleCollection
from rat_jax.data.example_corpus import describe, write_examples
from rat_jax.data.example_figures import Examples
from rat_jax.data.new_folder import new_folder
from rat_jax.data.packed_rows import PackedWriter
from rat_jax.data.prepare_flags import parse_flags
from rat_jax.data.prepare_settings import RELEASE_BIN, Settings
from rat_jax.data.sources import parse_source
from rat_jax.data.token_file import Header, TokenFileWriter, wrap_flat_file
from rat_jax.data.tokenizer import Tokenizer, train_bpe
from rat_jax.data.tokenizer_choice import absolute_tokenizer, is_path, parse_tokenizer
from rat_jax.data.workers import check_main
from rat_jax.files import system_errors
from rat_jax.paths import absolute_source, local_path
from rat_jax.program import exit_code


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
    check_main(num_workers)
    settings = settings.absolute()
    settings.check()
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
    template = settings.read_chat_template()
    collection = None if settings.is_release else _collection(settings, template)
    with system_errors(out, "written"), new_folder(out) as folder:
        if collection is None:
            corpus = _wrap_release(settings, folder)
        else:
            corpus = _encode(settings, collection, template, folder, num_workers)
        corpus.write_metadata()
    return Corpus.open(out)


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


def _finished(settings: Settings, out: pathlib.Path) -> Corpus:
    corpus = Corpus.open(out)
    wanted = settings.as_json()
    there = _with_absolute_paths(corpus.settings)
    differing = [name for name in wanted if there.get(name) != wanted[name]]
    if differing:
        changes = "; ".join(f"{n}: {_shown(there.get(n))} there, {_shown(wanted[n])} now" for n in differing)
        raise DataError(f"{out} was prepared with other settings ({changes}); choose another --out, or --overwrite")
    for split in SPLITS:
        corpus.token_file(split)
    tokenizer = corpus.tokenizer()
    if is_path(settings.tokenizer) and parse_tokenizer(settings.tokenizer, settings.eos_token).hash != tokenizer.hash:
        raise DataError(
            f"{out} was prepared with what {settings.tokenizer} held before it was changed; choose another --out, or "
            f"--overwrite"
        )
    template, there = settings.read_chat_template(), corpus.chat_template()
    if template != there:
        raise DataError(
            f"{out} was prepared with another chat template than there is now; choose another --out, or --overwrite"
        )
    print(f"{out}: already prepared")
    return corpus


def _shown(value: Any) -> str:
    return f"{value[:3]!r} and {len(value) - 3} more" if isinstance(value, list) and len(value) > 3 else repr(value)


def _with_absolute_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a corpus; earlier versions wrote paths as they were given."""
    changed = dict(settings)
    for name in ("source", "validation_source"):
        changed[name] = [absolute_source(str(spec)) for spec in settings.get(name) or []]
    if isinstance(settings.get("tokenizer"), str):
        changed["tokenizer"] = absolute_tokenizer(settings["tokenizer"])
    return changed


def _collection(settings: Settings, template: ChatTemplate | None) -> Collection:
    """The documents of the sources, which are looked at as far as is needed to know that the work can be done."""
    options = settings.read_options(template)
    collection = (Collection if settings.rows is None else ExampleCollection)(
        sources=[parse_source(spec, options) for spec in settings.source],
        validation_sources=[parse_source(spec, options) for spec in settings.validation_source],
        validation_fraction=settings.validation_fraction,
    )
    specs = settings.source + settings.validation_source
    for spec, source in zip(specs, (*collection.sources, *collection.validation_sources), strict=True):
        if settings.rows is not None and not source.has_records:
            raise DataError(
                f"{spec} holds text, and --rows wants examples: JSON lines, Parquet or a data set, each record with "
                f"prompt and answer, or with messages"
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
        path = pathlib.Path(spec.removeprefix(RELEASE_BIN))
        with tqdm.tqdm(unit="tok", unit_scale=True, desc=f"checking {path.name}") as bar:
            headers[split] = wrap_flat_file(folder / f"{split}.bin", path, tokenizer, bar.update)
    return _corpus(settings, folder, tokenizer, headers, None)


def _encode(
    settings: Settings,
    collection: Collection,
    template: ChatTemplate | None,
    folder: pathlib.Path,
    num_workers: int,
) -> Corpus:
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
    if isinstance(collection, ExampleCollection):
        form = {"rows": settings.rows, "seq_len": settings.seq_len}
        headers, examples = write_examples(
            collection, tokenizer, template, **form, folder=folder, num_workers=num_workers
        )
        return _corpus(settings, folder, tokenizer, headers, None, examples)
    encoder = Encoder(tokenizer, settings.validation_fraction)
    byte_counts = {split: np.zeros(256, np.int64) for split in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {s: stack.enter_context(_writer(settings, s, tokenizer, folder)) for s in SPLITS}
        bar = stack.enter_context(tqdm.tqdm(unit="doc", desc="encoding", total=collection.num_documents))
        for part in encode(collection.documents(), encoder, num_workers=num_workers):
            writers[part.split].append(part.ids, part.num_documents)
            byte_counts[part.split] += part.byte_counts
            bar.set_postfix(tokens=f"{sum(writer.num_tokens for writer in writers.values()):,}", refresh=False)
            bar.update(part.num_documents)
        headers = {split: writer.close() for split, writer in writers.items()}
    if not warned:
        _warn_of_separator(settings, collection)
    num_padding = writers["train"].num_padding if settings.packing else 0
    return _corpus(settings, folder, tokenizer, headers, byte_counts, num_padding=num_padding)


def _writer(
    settings: Settings, split: Split, tokenizer: Tokenizer, folder: pathlib.Path
) -> TokenFileWriter | PackedWriter:
    """Validation documents are never packed: their losses are those of any other run."""
    path = folder / f"{split}.bin"
    if settings.packing is None or split == "validation":
        return TokenFileWriter(path, tokenizer)
    return PackedWriter(path, tokenizer, settings.seq_len)


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
    examples: Examples | None = None,
    num_padding: int = 0,
) -> Corpus:
    def statistics(parts: Sequence[Split]) -> Statistics:
        counts = None if byte_counts is None else sum(byte_counts[split] for split in parts)
        return Statistics(
            num_documents=sum(headers[split].num_documents for split in parts),
            num_tokens=sum(headers[split].num_tokens for split in parts),
            num_bytes=None if counts is None else int(counts.sum()),
            byte_entropy_nats=None if counts is None else byte_entropy(counts),
            num_padding=num_padding if "train" in parts else 0,
        )

    return Corpus(
        path=folder,
        settings=settings.as_json(),
        python_version=platform.python_version(),
        tokenizer_hash=tokenizer.hash,
        splits={split: statistics([split]) for split in SPLITS},
        total=statistics(SPLITS),
        examples=examples,
    )


def _report(corpus: Corpus) -> None:
    if corpus.examples is not None:
        print("\n".join(describe(corpus.examples)))
        return
    for name, part in [*corpus.splits.items(), ("total", corpus.total)]:
        line = f"{name:<10} {part.num_documents:>12,} documents {part.num_tokens:>16,} tokens"
        if part.num_bytes is not None:
            line += (
                f"  {part.bytes_per_token:.3f} bytes/token  byte-unigram entropy {part.byte_entropy_nats:.4f} nats/byte"
            )
        print(line)
    if padding := corpus.total.num_padding:
        part, seq_len = corpus.splits["train"], corpus.settings["seq_len"]
        print(
            f"train rows of {seq_len:,} tokens hold whole documents, and pieces of longer ones (each is counted): "
            f"{padding / part.num_tokens:.2%} of their tokens are padding"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return exit_code(lambda: _run(parse_flags(arguments)))


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
            rows=flags.rows,
            seq_len=flags.seq_len,
            chat_template=flags.chat_template,
            packing=flags.packing,
        )
        corpus = prepare(settings, flags.out, num_workers=flags.num_workers, overwrite=flags.overwrite)
    else:
        corpus = Corpus.open(local_path(flags.out, "--out"))
    _report(corpus)
    if flags.verify:
        num_bytes = sum(corpus.token_file(split).header.num_bytes for split in SPLITS)
        with tqdm.tqdm(unit="B", unit_scale=True, desc="verifying", total=num_bytes) as bar:
            corpus.verify(progress=bar.update)
        print(f"{corpus.path}: verified, every token is as it was written")


if __name__ == "__main__":
    sys.exit(main())
