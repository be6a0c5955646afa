"""Best fit: every example once, no row too full, and as few rows as a loop that looks at all of them needs."""

import itertools

import hypothesis
import pytest
from hypothesis import strategies

from rat_jax.data.packing import best_fit

lengths_and_capacity = strategies.integers(1, 20).flatmap(
    lambda capacity: strategies.tuples(
        strategies.lists(strategies.integers(1, capacity), max_size=30), strategies.just(capacity)
    )
)


def loop(lengths, capacity):
    """Best fit decreasing by its definition."""
    rows = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        fill = [sum(lengths[other] for other in row) for row in rows]
        fitting = [place for place, filled in enumerate(fill) if filled + lengths[index] <= capacity]
        if fitting:
            rows[max(fitting, key=lambda place: fill[place])].append(index)
        else:
            rows.append([index])
    return rows


@hypothesis.given(lengths_and_capacity)
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
def test_rows(case):
    lengths, capacity = case
    rows = best_fit(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in row) <= capacity for row in rows)
    assert [row[0] for row in rows] == sorted(min(row) for row in rows)

    def fills(rows):
        return sorted(sum(lengths[index] for index in row) for row in rows)

    assert fills(rows) == fills(loop(lengths, capacity))


@pytest.mark.parametrize(
    ("lengths", "capacity", "rows"),
    [
        ([], 8, []),
        ([8, 8], 8, [[0], [1]]),
        ([3, 5, 4, 4], 8, [[0, 1], [2, 3]]),
        ([2, 6, 5, 3], 8, [[0, 1], [2, 3]]),
    ],
)
def test_known_rows(lengths, capacity, rows):
    assert best_fit(lengths, capacity) == rows
