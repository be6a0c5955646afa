"""Corpora of a few examples, whose texts are ids as numbers or what a test gives."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from rat_jax.data.corpus import Corpus
from rat_jax.data.prepare import Settings, prepare


def write_lines(path: pathlib.Path, records: Sequence[Any]) -> pathlib.Path:
    """JSON lines, one for each record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def settings(train: pathlib.Path, validation: pathlib.Path | None, **changes: Any) -> Settings:
    """Of packed rows of 32 bytes; `changes` are fields."""
    values = {
        "source": (str(train),),
        "validation_source": () if validation is None else (str(validation),),
        "validation_fraction": 0.3,
        "tokenizer": "bytes",
        "eos_token": None,
        "field": "text",
        "document_separator": None,
        "invalid_utf8": "refuse",
        "rows": "packed",
        "seq_len": 32,
    }
    return Settings(**{**values, **changes})


def make_examples(folder: pathlib.Path, train: Sequence[Any], validation: Sequence[Any], **changes: Any) -> Corpus:
    """A corpus of these records, in `folder`/corpus."""
    files = [write_lines(folder / f"{n}.jsonl", r) for n, r in (("train", train), ("validation", validation))]
    return prepare(settings(*files, **changes), folder / "corpus", num_workers=0, overwrite=False)


def number_records(count: int, prompt_len: int, answer_len: int, seed: int, vocab_size: int = 29) -> list[dict]:
    """Records whose prompts and answers are random numbers from 1 on, of up to so many."""
    rng = np.random.default_rng(seed)

    def numbers(most: int) -> str:
        return " ".join(map(str, rng.integers(1, vocab_size, rng.integers(most // 2 + 1, most + 1))))

    return [{"prompt": numbers(prompt_len), "answer": numbers(answer_len)} for _ in range(count)]
