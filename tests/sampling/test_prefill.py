"""Prompts read in chunks: the same whatever the chunks, with little padding, in few shapes."""

import jax
import numpy as np
import pytest

from rat_jax.sampling.prefill import (
    CHUNK_SIZES,
    chunk_of,
    empty_prompts,
    plan_chunks,
    read_chunk,
    sizes_for,
    sizes_up_to,
)
from tests.small import small_model


def test_chunks_hold_the_prompt_with_little_padding():
    for num_tokens in (*range(1, 300), 1000, 1024, 1025, 3000, 100_000):
        plan = plan_chunks(num_tokens, CHUNK_SIZES)
        assert set(plan) <= set(CHUNK_SIZES) and list(plan) == sorted(plan, reverse=True)
        assert sum(plan[:-1]) < num_tokens <= sum(plan)
        assert sum(plan) <= num_tokens + max(31, num_tokens // 4)
        assert len(plan) <= num_tokens // 1024 + 7


@pytest.mark.parametrize(
    ("longest", "sizes"),
    [(1, (16,)), (16, (16,)), (17, (16, 64)), (64, (16, 64)), (65, (16, 64, 256)), (5000, CHUNK_SIZES)],
)
def test_sizes_that_prompts_have_use_for(longest, sizes):
    assert sizes_up_to(longest, CHUNK_SIZES) == sizes


@pytest.mark.parametrize(
    ("lengths", "sizes"),
    [
        ([5, 12], (16,)),
        ([20, 40, 60], (16, 64)),  # 176 tokens in place of 192, were there no 16
        ([50, 60, 64], (64,)),
        (range(20, 1000), (64, 256, 1024)),
        (range(1020, 1025), (1024,)),
    ],
)
def test_sizes_that_save_little_padding_are_left_out(lengths, sizes):
    assert sizes_for(lengths, CHUNK_SIZES) == sizes


def test_chunks_of_any_size_give_the_same():
    decoder = small_model(("rat", "local_attention")).decoder()
    prompts = [np.random.default_rng(length).integers(0, 31, length) for length in (1, 7, 8, 9, 31)]

    def read(*sizes: int) -> jax.Array:
        rows = empty_prompts(decoder.layout, decoder.arrays, num_rows=6, capacity=32, with_seen=True)
        start = 0
        for size in sizes:
            rows = read_chunk(decoder.layout, decoder.arrays, rows, *chunk_of(prompts, start, size, 6))
            start += size
        for row, prompt in enumerate(prompts):
            assert set(np.flatnonzero(rows.seen[row])) == set(prompt)
        return rows

    whole, in_parts = read(32), read(8, 8, 8, 8)
    np.testing.assert_allclose(in_parts.hidden, whole.hidden, atol=1e-5, rtol=0)
    assert np.abs(whole.hidden[4]).max() > 0.1
    np.testing.assert_array_equal(whole.cache.stream.num_tokens, [1, 7, 8, 9, 31, 0])
    np.testing.assert_array_equal(in_parts.cache.stream.num_tokens, [1, 7, 8, 9, 31, 0])
