"""Positions, document starts and the order of tokens, from segment ids."""

import jax
import jax.numpy as jnp
import numpy as np

from rat_jax import segments as segments_module
from rat_jax.segments import whole_rows

from_segments = jax.jit(segments_module.from_segments)


def test_packed_row_with_padding_everywhere():
    layout, end = from_segments(jnp.array([[0, 7, 7, 7, 2, 0, 7, 7, 0]]))
    np.testing.assert_array_equal(layout.segment_ids, [[0, 1, 1, 1, 2, 0, 3, 3, 0]])
    np.testing.assert_array_equal(layout.positions, [[0, 0, 1, 2, 0, 0, 0, 1, 0]])
    np.testing.assert_array_equal(layout.token_index[0, np.array([1, 2, 3, 4, 6, 7])], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(layout.starts()[0], [0, 1, 0, 0, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(layout.starts(2)[0], [0, 1, 0, 1, 1, 0, 1, 0, 0])
    np.testing.assert_array_equal(layout.ends(2)[0], [0, 0, 1, 0, 0, 0, 0, 1, 0])
    assert (end.segment_id[0], end.num_documents[0], end.position[0], end.num_tokens[0]) == (7, 3, 2, 6)


def test_rows_cut_anywhere_continue():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 1, 1], [0, 0, 1, 1, 1, 1, 0, 0], [0] * 8])
    whole, whole_end = from_segments(segments)
    for cut in (1, 2, 3, 5, 6, 7):
        first, end = from_segments(segments[:, :cut])
        second, end = from_segments(segments[:, cut:], end)
        is_token = np.array(whole.is_token)
        for name in ("segment_ids", "positions", "token_index"):
            parts = np.concatenate([getattr(first, name), getattr(second, name)], axis=1)
            np.testing.assert_array_equal(parts[is_token], np.array(getattr(whole, name))[is_token])
        for name in ("segment_id", "num_documents", "position", "num_tokens"):
            np.testing.assert_array_equal(getattr(end, name), getattr(whole_end, name))


def test_whole_rows_are_what_one_segment_a_row_describes():
    whole, one = whole_rows(2, 5), from_segments(jnp.ones((2, 5), jnp.int32))[0]
    for name in ("segment_ids", "positions", "token_index"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(one, name))
    assert whole.contiguous and not one.contiguous


def test_slots_hold_what_was_left_in_them():
    segments = jnp.array([[1, 1, 2, 2, 2, 0, 2, 2, 1, 1], [0, 0, 1, 1, 1, 1, 1, 1, 1, 0], [0] * 10])
    whole, _ = from_segments(segments)
    period, capacity, ring = 2, 4, 3
    for cut in range(1, segments.shape[1]):
        _, end = from_segments(segments[:, :cut])
        later, _ = from_segments(segments[:, cut:], end)
        for row in range(3):
            slots, runs, last = np.zeros(10), np.zeros(capacity), [-1] * ring
            new = np.flatnonzero(np.array(later.is_token[row]))
            seen = int(later.segment_ids[row, new[0]]) if new.size else -1  # the document that may still see slots
            for t in np.flatnonzero(np.array(whole.is_token[row, :cut])):
                index, segment = int(whole.token_index[row, t]), int(whole.segment_ids[row, t])
                slots[index], last[index % ring] = segment, index
                if whole.ends(period)[row, t]:
                    slot = int(whole.first_slots(period)[row, t] + whole.positions[row, t] // period)
                    assert slot == (index + 1) // period - 1 and runs[slot] == 0
                    runs[slot] = segment
            np.testing.assert_array_equal(later.held(10)[row], np.where(slots == seen, slots, 0))
            np.testing.assert_array_equal(later.held(capacity, period)[row], np.where(runs == seen, runs, 0))
            held, index = (np.array(x[row]) for x in later.held_in_ring(ring))
            for slot in range(ring):
                visible = last[slot] >= 0 and slots[last[slot]] == seen
                assert held[slot] == (seen if visible else 0)
                assert not visible or index[slot] == last[slot]
