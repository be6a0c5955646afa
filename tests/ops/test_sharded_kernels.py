"""Kernels under shard_map: four devices compute what one does."""

import functools

import numpy as np
import pytest

from tests import four_devices


@functools.cache
def results(*ops):
    """What a process of its own, which sees four CPU devices, computed on each mesh."""
    return four_devices.run("tests.ops.sharded_kernels", *ops)


@pytest.mark.parametrize("op", ["rat", "linear", pytest.param("windowed", marks=pytest.mark.slow)])
def test_four_devices_give_what_one_does(op):
    """Values and gradients, with those of parameters that all rows share summed over devices."""
    found = results(*(("windowed",) if op == "windowed" else ("rat", "linear")))[op]
    assert [found[mesh]["devices"] for mesh in ("1x1", "2x2")] == [1, 4]
    for a, b in zip(found["2x2"]["results"], found["1x1"]["results"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
