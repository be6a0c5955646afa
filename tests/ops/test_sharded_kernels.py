"""Kernels under shard_map: four devices compute what one does."""

import functools

import numpy as np
import pytest

from tests import virtual_devices

QUICK = ("rat", "linear", "mlp")  # ops that one process computes


@functools.cache
def results(kind, *ops):
    """What a process of its own, which sees four CPU devices, computed on each mesh."""
    return virtual_devices.run("tests.ops.sharded_kernels", kind, *ops)


@pytest.mark.parametrize("op", [*QUICK, *(pytest.param(op, marks=pytest.mark.slow) for op in ("windowed", "causal"))])
@pytest.mark.parametrize("kind", ["packed", pytest.param("whole", marks=pytest.mark.slow)])
@pytest.mark.parametrize("mesh", ["rows", "tokens", "both"])
def test_virtual_devices_give_what_one_does(op, kind, mesh):
    """Values and gradients, with those of parameters that all rows share summed over devices."""
    found = results(kind, *(QUICK if op in QUICK else (op,)))[op]
    assert (found["one"]["devices"], found[mesh]["devices"]) == (1, 4)
    for a, b in zip(found[mesh]["results"], found["one"]["results"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_cudnn_over_parts_of_rows_is_partitioned():
    """With a window of no earlier key, of some queries of a part, of all of them, and of more.

    XLA has crashed on scatters of nothing, and JAX on reshapes of no queries.
    """
    windows = ["none", "0", "5", "32", "50"]
    found = virtual_devices.run("tests.ops.partitioned_for_gpus", *windows, count=2)
    assert len(found) == len(windows)
    assert all("No registered implementation for untyped custom call to __cudnn$fmha" in text for text in found), found
