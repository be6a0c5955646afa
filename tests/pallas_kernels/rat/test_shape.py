"""Sizes of the RAT op that no implementation takes."""

import dataclasses

import pytest

from pallas_kernels.rat.shape import RatShape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "every size must be 1 or more"),
        ({"num_groups": 3}, "num_heads must be a multiple of num_groups, got 4 and 3"),
        ({"head_dim": 33}, "RoPE needs an even head_dim, got 33; the nearest are 32 and 34"),
    ],
)
def test_what_no_implementation_takes(changes, message):
    shape = RatShape(2, 8, 4, 2, 16, 4, "float32", 10_000.0, segmented=False)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(shape, **changes)


def test_heads_that_are_not_rotated_may_be_odd():
    assert RatShape(2, 8, 4, 2, 33, 4, "float32", None, segmented=False).width == 132
