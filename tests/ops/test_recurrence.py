"""The gated recurrence: blocks, documents, chunks, padding, initial states, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.ops import recurrence
from rat_jax.segments import from_segments
from tests import reference

gated_recurrence = jax.jit(recurrence.gated_recurrence, static_argnames=("chunk_size", "block_size"))


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 40])
def test_equals_the_loop_whatever_the_blocks(tokens):
    gate, value = jax.random.normal(jax.random.key(0), (2, 2, tokens, 3))
    initial = jax.random.normal(jax.random.key(1), (2, 3))
    for block_size in (1, 8, 64):
        found = gated_recurrence(gate, value, initial_state=initial, block_size=block_size)
        np.testing.assert_allclose(found, reference.gated_recurrence(gate, value, initial), atol=1e-6)


def test_documents_forget_and_padding_keeps():
    gate, value = jax.random.normal(jax.random.key(0), (2, 1, 12, 3))
    segment_ids = jnp.array([[3, 3, 3, 3, 3, 1, 1, 1, 0, 0, 1, 1]])
    found = gated_recurrence(gate, value, segment_ids=segment_ids, block_size=4)
    np.testing.assert_allclose(found[:, :5], reference.gated_recurrence(gate[:, :5], value[:, :5]), atol=1e-6)
    kept = np.array([5, 6, 7, 10, 11])
    np.testing.assert_allclose(found[:, kept], reference.gated_recurrence(gate[:, kept], value[:, kept]), atol=1e-6)
    np.testing.assert_array_equal(found[:, 8:10], found[:, 7:8].repeat(2, axis=1))


@pytest.mark.parametrize("continued", [False, True])
def test_chunks_forget(continued):
    gate, value = jax.random.normal(jax.random.key(0), (2, 2, 11, 3))
    initial = jax.random.normal(jax.random.key(1), (2, 3)) if continued else None
    found = gated_recurrence(gate, value, chunk_size=4, initial_state=initial, block_size=4)
    for start in (0, 4, 8):
        part = gate[:, start : start + 4], value[:, start : start + 4]
        expected = reference.gated_recurrence(*part, *([initial] if continued and start == 0 else []))
        np.testing.assert_allclose(found[:, start : start + 4], expected, atol=1e-6)


def test_segments_that_continue_read_the_initial_state_until_a_document_or_a_chunk_begins():
    gate, value = jax.random.normal(jax.random.key(0), (2, 1, 11, 3))
    segment_ids = jnp.array([[1] * 8 + [2] * 3])
    whole = gated_recurrence(gate, value, segment_ids=segment_ids, chunk_size=5)
    first, end = from_segments(segment_ids[:, :3])
    rest, _ = from_segments(segment_ids[:, 3:], end)
    head = gated_recurrence(gate[:, :3], value[:, :3], segment_ids=first, chunk_size=5)
    options = {"segment_ids": rest, "chunk_size": 5, "initial_state": head[:, -1]}
    found = gated_recurrence(gate[:, 3:], value[:, 3:], **options)
    np.testing.assert_allclose(found, whole[:, 3:], atol=1e-6)


def test_gradients_of_decay_update_and_initial_state():
    decay = jax.random.uniform(jax.random.key(0), (2, 11, 3))
    update = jax.random.normal(jax.random.key(1), (2, 11, 3))
    initial = jax.random.normal(jax.random.key(2), (2, 3))
    weights = jax.random.normal(jax.random.key(3), (2, 11, 3))

    def by_steps(decay, update, initial):
        def step(state, inputs):
            state = inputs[0] * state + inputs[1]
            return state, state

        moved = (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(update, 1, 0))
        return jnp.sum(jnp.moveaxis(jax.lax.scan(step, initial, moved)[1], 0, 1) * weights)

    def by_scan(decay, update, initial):
        return jnp.sum(recurrence.linear_recurrence(decay, update, initial, 4) * weights)

    found, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(decay, update, initial) for f in (by_scan, by_steps))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_memory_of_many_tokens_with_gates_near_one_does_not_drift_in_bfloat16():
    tokens = 4096
    gate, value = jnp.full((1, tokens, 1), 4.0, jnp.bfloat16), jnp.ones((1, tokens, 1), jnp.bfloat16)
    found = gated_recurrence(gate, value)
    np.testing.assert_allclose(found[0, -1, 0], 1.0, atol=1e-5)
