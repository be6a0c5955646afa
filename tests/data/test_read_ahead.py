"""Rows are asked of the system before they are read, so that those that wait for a disk wait together."""

import os

import numpy as np
import pytest

from rat_jax.data.integrity import BLOCK_BYTES
from rat_jax.data.pipeline import TrainData, ValidationData
from rat_jax.data_config import DataConfig
from tests.data.prepared import run
from tests.tiny_sft import make_examples, settings, write_lines

ROWS = 4


@pytest.fixture
def calls(monkeypatch):
    """What the system is told and asked for, in order: kind, first and last byte."""
    seen, read, advise = [], os.pread, os.posix_fadvise

    def pread(file, size, start):
        seen.append(("read", start, start + size))
        return read(file, size, start)

    def posix_fadvise(file, start, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        seen.append(("ahead", start, start + size))
        return advise(file, start, size, advice)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "posix_fadvise", posix_fadvise)
    return seen


def corpus_of(kind, folder):
    if kind == "examples":
        records = [{"prompt": f"number {i}:", "answer": f"it is {i}"} for i in range(60)]
        return make_examples(folder, records, records)
    source = write_lines(folder / "documents.jsonl", [{"text": f"text {i * 7919} " * 800} for i in range(40)])
    return run(settings(source, None, rows=None, seq_len=None), folder / "corpus")


@pytest.mark.parametrize("kind", ["documents", "examples"])
@pytest.mark.parametrize("make", [TrainData, ValidationData])
def test_a_row_is_asked_for_a_batch_before_it_is_read(kind, make, tmp_path, calls):
    corpus = corpus_of(kind, tmp_path)
    config = DataConfig(path=str(corpus.path), seq_len=32, global_batch_size=ROWS, segment_documents=True)
    arguments = {"seed": 0} if make is TrainData else {"max_batches": 3}
    data = make(config, vocab_size=257, **arguments)
    calls.clear()
    batches = iter(data)
    for _ in range(3):
        next(batches)
    kinds = [kind for kind, _, _ in calls]
    assert kinds.index("read") == 2 * ROWS  # the first batch and the second
    for number, (kind, first, last) in enumerate(calls):
        if kind == "read":
            assert any(k == "ahead" and a <= first and last <= b for k, a, b in calls[:number])


def test_blocks_are_asked_for_whole_until_they_are_checked(tmp_path, calls):
    file = corpus_of("documents", tmp_path).token_file("train")
    file.read(0, 1)
    calls.clear()
    blocks = 2 * BLOCK_BYTES // 2  # the first id of the third block
    for _ in range(2):
        file.read_ahead(blocks + 5, blocks + 37)
        file.read(blocks + 5, blocks + 37)
    start = calls[-1][1] - 10
    assert [(kind, first - start, last - start) for kind, first, last in calls] == [
        *(("ahead", 0, BLOCK_BYTES), ("read", 0, BLOCK_BYTES), ("read", 10, 74)),
        *(("ahead", 10, 74), ("read", 10, 74)),
    ]


def test_advice_that_is_refused_is_left_out(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(22, "no")

    monkeypatch.setattr(os, "posix_fadvise", refuse)
    corpus = corpus_of("examples", tmp_path)
    config = DataConfig(path=str(corpus.path), seq_len=32, global_batch_size=ROWS, segment_documents=True)
    assert np.any(next(TrainData(config, vocab_size=257, seed=0)).tokens)
