"""Scores of outputs made by hand."""

import pytest

from rat_jax.evaluation.ruler.scoring import scores


@pytest.mark.parametrize(
    ("prediction", "answers", "want"),
    [
        (" 1234567", ["1234567"], (1, 1, 1)),
        (" 1234567.", ["1234567"], (1, 1, 0)),
        (" 12345678", ["1234567"], (1, 1, 0)),
        (" 7654321", ["1234567"], (0, 0, 0)),
        ("", ["1234567"], (0, 0, 0)),
        (" one is 11, then 22\n", ["11", "22"], (1, 1, 0)),
        ("22, 11", ["11", "22"], (1, 1, 1)),
        (" 22 , 33\n", ["11", "22"], (0.5, 1, 0.5)),
        ("11,11,11", ["11", "22", "33", "44"], (0.25, 1, 0.25)),
        ("ABCDE FGHIJ", ["abcde", "FGHIJ"], (1, 1, 0)),
        ("ab\x00cd", ["abcd"], (0, 0, 0)),
    ],
)
def test_scores(prediction, answers, want):
    names = ("string_match_all", "string_match_part", "exact_match")
    assert scores(prediction, answers) == dict(zip(names, want, strict=True))
