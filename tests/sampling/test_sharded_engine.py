"""The engine on the devices of a mesh."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def results():
    """What a process of its own, which sees four CPU devices, computed on each mesh."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.sampling.sharded_engine"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_four_devices_continue_as_one(results):
    assert results["2x2"]["tokens"] == results["1x1"]["tokens"]
    assert {len(row) for row in results["1x1"]["tokens"]} == {12}
    assert results["2x2"]["generated"] == [row[:2] for row in results["1x1"]["tokens"][:3]]


def test_rows_and_parameters_are_cut(results):
    assert all(result["mesh_is_found"] for result in results.values())
    assert [results[mesh]["slots_of_a_device"] for mesh in ("1x1", "2x2")] == [4, 1]
    assert [results[mesh]["weights_of_a_device"] for mesh in ("1x1", "2x2")] == [1, 1 / 2]


def test_programs_are_as_few_on_a_mesh(results):
    assert results["1x1"]["compiled"] <= results["1x1"]["num_programs"]
    # `generate` adds those of an engine of its own.
    assert results["2x2"]["compiled"] <= 2 * results["2x2"]["num_programs"]
