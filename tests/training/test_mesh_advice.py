"""Meshes whose exchanges the compiler for TPUs does badly, as it was found to do."""

import itertools
import types

import numpy as np
import pytest

from rat_jax.training.mesh_advice import mesh_advice


def mesh(sides: tuple[int, ...], data: int = 1, context: int = 1, platform: str = "tpu"):
    places = itertools.product(*(range(size) for size in (*sides, 1)[:3]))
    devices = [types.SimpleNamespace(platform=platform, coords=place) for place in places]
    shape = {"data": data, "fsdp": len(devices) // (data * context), "context": context}
    return types.SimpleNamespace(devices=np.array(devices), size=len(devices), shape=shape)


@pytest.mark.parametrize("sides", [(8, 8), (16, 16), (4, 4, 4), (4, 4, 8)])
def test_all_chips_of_a_square_or_a_cube(sides):
    shape = "x".join(map(str, sides))
    assert f"config.mesh.fsdp over all {np.prod(sides)} chips of {shape}" in mesh_advice(mesh(sides))
    assert mesh_advice(mesh(sides, data=2)) is None


def test_parameters_are_cut_along_context_too():
    assert "config.mesh.fsdp times config.mesh.context over all 64 chips" in mesh_advice(mesh((4, 4, 4), context=4))
    assert "config.mesh.context over all 64 chips" in mesh_advice(mesh((4, 4, 4), context=64))
    assert mesh_advice(mesh((4, 4, 4), data=2, context=4)) is None


@pytest.mark.parametrize("sides", [(1, 1), (2, 2), (4, 4), (2, 2, 4), (4, 8), (4, 16), (8, 16)])
def test_rectangles_and_few_chips(sides):
    assert mesh_advice(mesh(sides)) is None


def test_other_devices():
    assert mesh_advice(mesh((4, 4), platform="gpu")) is None
