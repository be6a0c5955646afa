"""Encoding: documents stream through it, and workers change nothing."""

import dataclasses

from rat_jax.data.encoding import Encoder, encode
from rat_jax.data.tokenizer import ByteTokenizer
from tests.data.prepared import contents, run


def test_workers_change_nothing(settings, tmp_path, monkeypatch):
    """Batches of a few documents each, so that many are under way at once."""
    monkeypatch.setattr("rat_jax.data.encoding._BATCH_CHARACTERS", 500)
    settings = dataclasses.replace(settings, tokenizer="bpe:300")
    alone, together = run(settings, tmp_path / "0"), run(settings, tmp_path / "2", num_workers=2)
    assert contents(alone.path) == contents(together.path)


def test_encoding_is_lazy(monkeypatch):
    """A corpus larger than memory: few documents are read ahead of those that were encoded."""
    monkeypatch.setattr("rat_jax.data.encoding._BATCH_CHARACTERS", 10)
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield "train", "ten characters"

    for num_workers, most in ((0, 1), (1, 2)):
        num_read = 0
        parts = encode(endless(), Encoder(ByteTokenizer(), 0.1), num_workers=num_workers)
        for i in range(1, 6):
            assert next(parts).num_documents == 1
            assert num_read <= i + most
        parts.close()
