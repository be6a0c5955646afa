"""Corpora that tests prepare, and what is in them."""

import dataclasses

import numpy as np
import pytest

from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus
from rat_jax.data.prepare import Settings, prepare
from rat_jax.data.token_file import TokenFile


def run(settings, out, *, num_workers=0, overwrite=False) -> Corpus:
    return prepare(settings, out, num_workers=num_workers, overwrite=overwrite)


def prepare_ids(folder, train, validation, vocab_size: int, eos_id: int, **options) -> Corpus:
    """The corpus of two arrays of ids, by way of the release's files."""
    for split, ids in (("train", train), ("validation", validation)):
        ids.tofile(folder / f"{split}_ids.bin")
    settings = Settings(
        source=(f"release-bin:{folder / 'train_ids.bin'}",),
        validation_source=(f"release-bin:{folder / 'validation_ids.bin'}",),
        validation_fraction=0.1,
        tokenizer=f"ids:{vocab_size}:{eos_id}",
        eos_token=None,
        field="text",
        document_separator=None,
        invalid_utf8="refuse",
    )
    return run(settings, folder / "corpus", **options)


def all_ids(file: TokenFile) -> np.ndarray:
    return file.read(0, len(file))


def documents(corpus, split) -> list[str]:
    """What the token file of a split says, as text."""
    tokenizer = corpus.tokenizer()
    ids = all_ids(corpus.token_file(split))
    assert ids[-1] == tokenizer.eos_id
    ends = np.flatnonzero(ids == tokenizer.eos_id)
    return [tokenizer.decode(part.tolist()) for part in np.split(ids, ends[:-1] + 1)]


def texts_of(folder) -> list[str]:
    return [path.read_text() for path in sorted(folder.iterdir())]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(source, out, *more) -> list[str]:
    arguments = ["--source", str(source), "--tokenizer", "bytes", "--out", str(out), "--num_workers", "0"]
    return [*arguments, *map(str, more)]


def failure(settings, out, message, **changes):
    """The error of a command, which leaves nothing behind."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(DataError, match=message):
        run(dataclasses.replace(settings, **changes), out)
    assert sorted(out.parent.iterdir()) == before
