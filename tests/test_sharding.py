"""The mesh, the table of parameters, and that neither changes what is computed."""

import importlib
import math
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rat_jax import sharding
from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import ConfigError, MeshConfig, config_from_dict
from rat_jax.mixers import MIXERS
from rat_jax.model import parameter_spec
from rat_jax.sharding import check_divides, check_spec, leaf_names, make_mesh, partition_specs, shardings
from tests import virtual_devices
from tests.small import small_model_config
from tests.tiny_run import tiny_config

REPOSITORY = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (REPOSITORY / "configs").glob("*.py") if path.stem != "__init__")


def mesh_of(data, fsdp, context=1, tensor=1):
    """Stands for a mesh of more devices than there are."""
    sizes = {"data": data, "fsdp": fsdp, "context": context, "tensor": tensor}
    return types.SimpleNamespace(shape=sizes, size=math.prod(sizes.values()))


class TestTable:
    """The table has exactly one line for every parameter."""

    @pytest.mark.parametrize("name", CONFIGS)
    def test_matrices_of_all_configs_are_cut_along_their_width(self, name):
        config = config_from_dict(importlib.import_module(f"configs.{name}").get_config())
        _, params = abstract_model(config.model)
        specs = jax.tree.leaves(partition_specs(params), is_leaf=lambda x: isinstance(x, PartitionSpec))
        for leaf_name, leaf, spec in zip(leaf_names(params), jax.tree.leaves(params), specs, strict=True):
            axes = [axis for axis, part in enumerate(spec) if "fsdp" in (part or ())]
            assert len(axes) == (1 if parameter_spec(leaf_name).matmul else 0), leaf_name
            assert all(leaf.shape[axis] == config.model.width for axis in axes), leaf_name

    def test_learned_initial_states_are_cut_along_their_heads(self):
        changes = {"model__num_kv_heads": 1, "model__qk_norm": True, "data__global_batch_size": 16}
        config = tiny_config("data", model__pattern=("rattention",), **changes)
        params = abstract_model(config.model)[1]
        specs = jax.tree.leaves(partition_specs(params), is_leaf=lambda x: isinstance(x, PartitionSpec))
        by_name = dict(zip(leaf_names(params), specs, strict=True))
        for name in ("meta_key", "meta_value"):
            assert by_name[f"blocks.00_rattention.mixer.{name}"] == PartitionSpec(None, None, ("fsdp", "context"))
        with pytest.raises(
            ConfigError, match=r"mixer\.meta_key, whose axis kv_channels of 8 does not divide by the fsdp axis of 16"
        ):
            check_divides(config, mesh_of(1, 16))

    def test_a_parameter_that_no_table_names(self):
        with pytest.raises(ValueError, match=r"blocks\.00_rat\.surprise is a parameter that no PARAMETERS table"):
            partition_specs({"blocks": {"00_rat": {"surprise": jnp.zeros((2, 2))}}})

    def test_a_parameter_with_other_axes_than_its_table_says(self):
        with pytest.raises(ValueError, match=r"blocks\.00_rat\.mixer\.gate_bias has 3 axes"):
            partition_specs({"blocks": {"00_rat": {"mixer": {"gate_bias": jnp.zeros((2, 2, 2))}}}})

    @pytest.mark.parametrize("kind", MIXERS)
    def test_tables_name_every_parameter_of_every_mixer(self, kind):
        params = abstract_model(small_model_config((kind,)))[1]
        specs = jax.tree.leaves(partition_specs(params), is_leaf=lambda x: isinstance(x, PartitionSpec))
        assert len(specs) == len(jax.tree.leaves(params))  # none was refused
        assert any("fsdp" in (part or ()) for spec in specs for part in spec)

    def test_double_use_of_an_axis(self):
        with pytest.raises(ValueError, match=r"w: .* uses an axis of the mesh twice"):
            check_spec("w", ("fsdp", ("data", "fsdp")), 2)

    def test_more_axes_than_the_array_has(self):
        with pytest.raises(ValueError, match="w has 1 axes"):
            check_spec("w", PartitionSpec(None, "fsdp"), 1)

    def test_a_large_parameter_may_not_stay_whole(self, monkeypatch):
        monkeypatch.setitem(sharding.MESH_AXES, "width", ())
        params = {"embedding": jax.ShapeDtypeStruct((2048, 1024), jnp.float32)}
        with pytest.raises(ValueError, match=r"embedding \(2048, 1024\) would be whole on all 2 devices"):
            shardings(params, mesh_of(1, 2))

    def test_lists_have_no_stable_names(self):
        with pytest.raises(ValueError, match="index"):
            leaf_names({"layers": [jnp.zeros(1)]})


class TestMesh:
    """Numbers that do not divide."""

    def test_rest(self):
        mesh = make_mesh(MeshConfig(data=1, fsdp=-1))
        assert dict(mesh.shape) == {"data": 1, "fsdp": len(jax.devices()), "context": 1, "tensor": 1}

    @pytest.mark.parametrize(("data", "fsdp"), [(2, 1), (2, -1), (1, 2), (-1, 3)])
    def test_devices(self, data, fsdp):
        with pytest.raises(ConfigError, match=rf"mesh\.data {data}, .*mesh\.fsdp {fsdp}, .* the 1 devices"):
            make_mesh(MeshConfig(data=data, fsdp=fsdp), jax.devices()[:1])

    def test_batch(self):
        config = tiny_config("data", optimizer__accumulation_steps=4)
        check_divides(config, mesh_of(2, 1))
        with pytest.raises(ConfigError, match=r"global_batch_size 8 .* 4 is 2 sequences .* 4 devices"):
            check_divides(config, mesh_of(2, 2))

    def test_width(self):
        with pytest.raises(
            ConfigError, match=r"in_proj\.kernel, whose axis width of 12 does not divide by the fsdp axis of 8"
        ):
            check_divides(tiny_config("data", model__width=12), mesh_of(1, 8))


@pytest.fixture(scope="module")
def results():
    """What a process of its own, which sees four CPU devices, computed on one of them and on two by two."""
    return virtual_devices.run("tests.sharded_steps", "1x1", "2x2")


@pytest.fixture(scope="module")
def results_of_lines():
    """The same on meshes of one axis, which 2x2 has both."""
    return virtual_devices.run("tests.sharded_steps", "1x1", "4x1", "1x4")


LINES = [pytest.param("results_of_lines", mesh, marks=pytest.mark.slow, id=mesh) for mesh in ("4x1", "1x4")]


class TestFourDevices:
    """Four devices compute what one does."""

    @pytest.mark.parametrize(("computed", "mesh"), [*LINES, pytest.param("results", "2x2", id="2x2")])
    def test_every_mesh_computes_the_same(self, request, computed, mesh):
        results = request.getfixturevalue(computed)
        one, many = results["1x1"], results[mesh]
        np.testing.assert_allclose(many["losses"], one["losses"], rtol=1e-5)
        assert one["losses"][1] < one["losses"][0]
        for a, b in zip(many["start"], one["start"], strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b, start in zip(many["params"], one["params"], one["start"], strict=True):
            moved = np.abs(np.subtract(b, start)).max()
            np.testing.assert_allclose(a, b, atol=1e-4 * moved)
        assert many["compiled"] == 1

    def test_the_optimizer_state_is_cut_like_its_parameters(self, results):
        assert {mesh: result["moments_on_a_device"] for mesh, result in results.items()} == {"1x1": 1, "2x2": 1 / 2}

    @pytest.mark.slow
    def test_the_optimizer_state_is_cut_along_one_axis(self, results_of_lines):
        parts = {mesh: result["moments_on_a_device"] for mesh, result in results_of_lines.items()}
        assert parts == {"1x1": 1, "4x1": 1, "1x4": 1 / 4}

    def test_scores_of_tokens(self, results):
        np.testing.assert_allclose(results["2x2"]["log_probs"], results["1x1"]["log_probs"], atol=1e-4)
        assert np.std(results["1x1"]["log_probs"]) > 0.01

    def test_scored_rows_are_divided_among_all_devices(self, results):
        shares = {mesh: results[mesh]["shares_of_scored_rows"] for mesh in ("1x1", "2x2")}
        assert shares == {"1x1": [[1], [1]], "2x2": [[1 / 4], [1 / 4]]}

    def test_options_of_questions_whose_contexts_are_read_once(self, results):
        np.testing.assert_allclose(results["2x2"]["options"], results["1x1"]["options"], atol=1e-4)
        assert np.std(results["1x1"]["options"]) > 0.01
        # 64 tokens on each device that all begin with, then 16 and four options of 8 for each question, with padding.
        tokens = {mesh: results[mesh]["tokens_of_options"] for mesh in ("1x1", "2x2")}
        assert tokens == {"1x1": 64 + 16 * 48, "2x2": 4 * 64 + 16 * 48}

    def test_a_second_step_compiles_nothing(self, results):
        assert {result["compiled"] for result in results.values()} == {1}
