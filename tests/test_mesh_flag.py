"""What `--mesh` makes of the devices; its errors on a command line are in `tests/cluster/test_inference.py`."""

import pytest

from rat_jax import mesh_flag
from rat_jax.checkpoints.store import abstract_model
from rat_jax.errors import ConfigError
from rat_jax.memory import tree_bytes
from rat_jax.mesh_flag import MeshChoice
from rat_jax.program import FlagError
from tests.test_sharding import mesh_of
from tests.tiny_run import tiny_config

MODEL = tiny_config("data").model


def test_tokens_and_heads_are_cut_for_losses_alone():
    MeshChoice(None).check_rows_whole("--tasks")
    MeshChoice(mesh_of(2, 4)).check_rows_whole("--tasks")
    for mesh, size in ((mesh_of(1, 1, context=2), "context=2"), (mesh_of(1, 2, tensor=4), "tensor=4")):
        with pytest.raises(FlagError, match=rf"--mesh has {size}, and --tasks reads rows whole: give fsdp=. instead"):
            MeshChoice(mesh).check_rows_whole("--tasks")


def test_parameters_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"--mesh with data 1, fsdp 3: config.model has .* of 16 does not divide by"):
        MeshChoice(mesh_of(1, 3)).mesh_for(MODEL, print)


@pytest.mark.parametrize(("share", "sizes"), [(None, (2, 1)), (0.4, (2, 1)), (0.6, (1, 2))])
def test_without_it_memory_decides(monkeypatch, share, sizes):
    """Whole parameters where they take half of what a device has free, or nobody knows; else cut ones, and said so."""

    def mesh_of_two(axes):
        return mesh_of(2 if axes.data == -1 else axes.data, 2 if axes.fsdp == -1 else axes.fsdp)

    monkeypatch.setattr(mesh_flag, "make_mesh", mesh_of_two)
    free = None if share is None else int(tree_bytes(abstract_model(MODEL)[1]) / share)
    monkeypatch.setattr(mesh_flag, "_least_free_bytes", lambda: free)
    said = []
    mesh = MeshChoice(None).mesh_for(MODEL, said.append)
    assert (mesh.shape["data"], mesh.shape["fsdp"]) == sizes
    assert len(said) == (1 if sizes == (1, 2) else 0)
    assert all("as --mesh=fsdp=-1 says" in line for line in said)
