"""What a prepared corpus says of its text: bits a byte add up, whatever the tokenizer."""

import dataclasses
import math

import numpy as np
import pytest

from rat_jax.config import DataConfig
from rat_jax.data.corpus import Statistics
from rat_jax.data.pipeline import ValidationData
from rat_jax.data.prepare import prepare


def test_bits_per_byte_of_three_short_documents():
    statistics = Statistics(num_documents=3, num_tokens=36, num_bytes=33, byte_entropy_nats=None)
    assert statistics.num_targets == 33
    nats = 33 * 7.42 * math.log(2)  # 33 targets, 33 bytes
    assert statistics.bits_per_byte(nats / 33) == pytest.approx(7.42)


def test_bits_per_byte_is_not_known_without_bytes_or_of_a_part_of_the_text():
    statistics = Statistics(num_documents=3, num_tokens=36, num_bytes=33, byte_entropy_nats=None)
    assert statistics.bits_per_byte(1.0, first_target_id=5) is None
    assert dataclasses.replace(statistics, num_bytes=None).bits_per_byte(1.0) is None
    assert dataclasses.replace(statistics, num_tokens=3, num_bytes=0).bits_per_byte(1.0) is None


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:258"])
@pytest.mark.parametrize("seq_len", [7, 1000])
def test_the_targets_of_a_split_are_those_that_count(settings, tmp_path, tokenizer, seq_len):
    for name, texts in (("train", ["abab" * 9]), ("validation", ["a", "bab" * 3, "c" * 20, "abc"])):
        (tmp_path / name).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / name / f"{number}.txt").write_text(text)
    settings = dataclasses.replace(
        settings, source=(str(tmp_path / "train"),), validation_source=(str(tmp_path / "validation"),)
    )
    settings = dataclasses.replace(settings, tokenizer=tokenizer)
    corpus = prepare(settings, tmp_path / "corpus", num_workers=0, overwrite=False)
    statistics = corpus.splits["validation"]
    data = DataConfig(path=str(corpus.path), seq_len=seq_len, global_batch_size=2)
    batches = ValidationData(data, vocab_size=corpus.tokenizer().vocab_size)
    counted = sum(float(np.sum(batch.loss_weights)) for batch in batches)
    assert statistics.num_targets == counted
    assert statistics.num_bytes == 33
    assert statistics.bits_per_byte(1.0) == pytest.approx(counted / math.log(2) / 33)
