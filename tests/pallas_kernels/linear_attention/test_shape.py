"""Sizes of linear attention that no implementation takes."""

import dataclasses

import pytest

from pallas_kernels.linear_attention.shape import LinearAttentionShape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokens": 0}, "every size must be 1 or more"),
        ({"num_heads": 5}, "query heads must be a multiple of key heads, got 5 and 2"),
        ({"feature_map": "elu"}, "feature_map must be 'softmax' or 'relu', got 'elu'"),
        ({"key_lag": -1}, "key_lag must be 0 or more, got -1"),
    ],
)
def test_what_no_implementation_takes(changes, message):
    shape = LinearAttentionShape(2, 8, 4, 2, 16, "float32", "softmax")
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(shape, **changes)
