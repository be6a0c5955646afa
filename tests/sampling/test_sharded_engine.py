"""The engine on the devices of a mesh."""

import pytest

from tests import virtual_devices


@pytest.fixture(scope="module")
def results():
    """What a process of its own, which sees four CPU devices, computed on each mesh."""
    return virtual_devices.run("tests.sampling.sharded_engine")


def test_virtual_devices_continue_as_one(results):
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
