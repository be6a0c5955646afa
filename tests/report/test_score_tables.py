"""Which score is the best."""

import pytest

from rat_jax.report.measurements import Score
from rat_jax.report.score_tables import best_of


def score(value, stderr=0.03, num=100, higher=True):
    return Score("task", "acc", value, stderr, num, higher)


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([score(0.5), score(0.55)], 1),  # the error of the difference is 0.0424
        ([score(0.5), score(0.54)], None),
        ([score(0.5, 0.03), score(0.55, 0.041)], None),  # 0.0508
        ([score(0.5, 0.04), score(0.6), score(0.595), score(0.1)], None),  # one of them is too near
        ([score(0.5), None, score(0.6)], 2),
        ([score(0.9, higher=False), score(0.5, higher=False)], 1),
        ([score(0.5), score(0.5)], None),
        ([score(0.5, 0.0), score(0.5, 0.0)], None),
        ([score(0.5)], None),
        ([None, score(0.5)], None),
        ([score(0.5, None), score(0.9)], None),
        ([score(0.5), score(0.9, None)], None),
        ([score(0.5), score(0.9, num=50)], None),
        ([score(0.5, higher=None), score(0.9, higher=None)], None),
        ([score(0.5), score(0.9, higher=False)], None),
        ([score(0.5, 1e200), score(0.9, 1e200)], None),
    ],
)
def test_the_best_is_ahead_of_each_other_by_more_than_the_error(scores, best):
    assert best_of(scores) == best
