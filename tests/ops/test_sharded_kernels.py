"""Kernels under shard_map: four devices compute what one does."""

import numpy as np
import pytest

from tests import virtual_devices


@pytest.fixture(scope="module")
def results():
    """What a process of its own, which sees four CPU devices, computed on each mesh."""
    return virtual_devices.run("tests.ops.sharded_kernels")


@pytest.mark.parametrize("op", ["rat", "linear"])
def test_virtual_devices_give_what_one_does(results, op):
    """Values and gradients, with those of parameters that all rows share summed over devices."""
    found = results[op]
    assert [found[mesh]["devices"] for mesh in ("1x1", "2x2")] == [1, 4]
    for a, b in zip(found["2x2"]["results"], found["1x1"]["results"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
