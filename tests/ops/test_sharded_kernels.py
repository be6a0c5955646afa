"""Kernels under shard_map: four devices compute what one does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def results():
    """What a process of its own, which sees four CPU devices, computed on each mesh."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.ops.sharded_kernels"]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("op", ["rat", "linear"])
def test_four_devices_give_what_one_does(results, op):
    """Values and gradients, with those of parameters that all rows share summed over devices."""
    found = results[op]
    assert [found[mesh]["devices"] for mesh in ("1x1", "2x2")] == [1, 4]
    for a, b in zip(found["2x2"]["results"], found["1x1"]["results"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
