"""Plans of batches hold every text once, in few shapes, with little padding."""

import numpy as np
import pytest

from rat_jax.evaluation.row_batches import PACKED_LENGTH, plan_batches


@pytest.mark.parametrize("num_devices", [1, 4])
@pytest.mark.parametrize("batch_tokens", [1, 500, 16_384])
def test_batches_hold_every_text_once_and_little_padding(num_devices, batch_tokens):
    rng = np.random.default_rng(8)
    lengths = np.exp(rng.uniform(np.log(1), np.log(1000), 2000)).astype(int).tolist()
    plan = plan_batches(lengths, 1000, batch_tokens, num_devices)
    assert sorted(text for batch in plan for row in batch.rows for text in row) == list(range(2000))
    for batch in plan:
        assert max(sum(lengths[text] for text in row) for row in batch.rows) <= batch.length
        assert batch.packed or all(len(row) == 1 for row in batch.rows)
        assert batch.length == PACKED_LENGTH if batch.packed else batch.length <= 1000
        assert len(batch.rows) <= batch.num_rows
        assert batch.num_rows % num_devices == 0
        assert batch.num_rows * batch.length <= max(batch_tokens, num_devices * batch.length)
    assert any(batch.packed for batch in plan) == (batch_tokens == 16_384)
    assert len({(batch.length, batch.packed) for batch in plan}) <= 4 * 7  # octaves from 16 to 1,000
    read = sum(max(16, length) for length in lengths)
    assert sum(batch.num_tokens for batch in plan) < 1.25 * read


def test_many_short_texts_are_two_shapes_without_padding():
    lengths = np.random.default_rng(9).integers(20, 200, 3000).tolist()
    plan = plan_batches(lengths, 4096, 16_384, 1)
    assert len({(batch.num_rows, batch.length) for batch in plan}) == 2  # full batches, and the last one
    assert sum(batch.num_tokens for batch in plan) < 1.03 * sum(lengths)


def test_a_few_rows_make_a_small_batch():
    (batch,) = plan_batches([20, 20, 20, 20, 20], 64, 100_000, 2)
    assert (batch.num_rows, batch.length, batch.packed) == (8, 32, False)


def test_the_arrays_of_a_packed_row():
    lengths = [400, 500, 100]  # 1,000 tokens in one row
    (batch,) = plan_batches(lengths, 4096, PACKED_LENGTH, 1)
    texts = [np.arange(1, length + 2) + 1000 * number for number, length in enumerate(lengths)]
    tokens, targets, segment_ids = batch.batch(texts)
    assert (batch.rows, tokens.shape) == ([[0, 1, 2]], (1, PACKED_LENGTH))
    np.testing.assert_array_equal(tokens[0, :1000], np.concatenate([text[:-1] for text in texts]))
    np.testing.assert_array_equal(targets[0, :1000], np.concatenate([text[1:] for text in texts]))
    np.testing.assert_array_equal(segment_ids[0], np.repeat([1, 2, 3, 0], [*lengths, 24]))
