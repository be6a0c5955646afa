"""Reading a model for evaluation and generation, also where its checkpoints are damaged or go away."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import pytest

from rat_jax.checkpoints import store as checkpoint
from rat_jax.checkpoints.owner import owned
from rat_jax.checkpoints.store import Checkpoints, Manifest, load_model
from rat_jax.checkpoints.workdir import CheckpointError, Workdir, check_same_model
from tests.checkpoints.saved_run import CONFIG, DAMAGES, assert_is_multiple, largest_file, save, times, tree


class TestLoadModel:
    """Reading for evaluation and generation."""

    def test_newest(self, saved, model):
        loaded = load_model(saved)
        assert (loaded.step, loaded.config) == (30, CONFIG)
        assert loaded.path == saved / "checkpoints/30"
        assert_is_multiple(loaded.model, model, 30)
        assert loaded.model(jnp.ones((1, 4), jnp.int32)).shape == (1, 4, CONFIG.model.vocab_size)

    def test_version_1_had_fewer_fields(self, run):
        file = run / "checkpoints/30/manifest.json"
        values = json.loads(file.read_text()) | {"format_version": 1}
        del values["checksum"]
        for name in ("num_kv_heads", "qk_norm", "mlp_kind", "scan_unroll"):
            del values["config"]["model"][name]
        del values["config"]["data"]["first_target_id"]
        file.write_text(json.dumps(values))
        loaded = load_model(run)
        assert loaded.step == 30
        check_same_model(loaded.config.model, CONFIG.model, run)
        other = dataclasses.replace(CONFIG.model, mlp_kind="geglu")
        with pytest.raises(CheckpointError, match=r"config\.model\.mlp_kind is 'gelu' there, 'geglu' now"):
            check_same_model(loaded.config.model, other, run)

    def test_a_certain_step(self, saved, model):
        assert_is_multiple(load_model(saved, step=10).model, model, 10)
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 15; it has \[10, 20, 30\]"):
            load_model(saved, step=15)

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_walks_back_and_says_so(self, run, model, damage):
        damage(run)
        said = []
        assert_is_multiple(load_model(run, report=said.append).model, model, 20)
        assert len(said) == 1
        assert "checkpoints/30" in said[0]
        with pytest.raises(CheckpointError, match="checkpoints/30"):
            load_model(run, step=30)

    def test_missing_foreign_and_empty_workdirs(self, run, tmp_path):
        with pytest.raises(CheckpointError, match="there is no workdir"):
            load_model(tmp_path / "nowhere")
        with pytest.raises(CheckpointError, match=r"not the workdir of a run: it has no run\.json"):
            load_model(tmp_path)
        shutil.rmtree(run / "checkpoints")
        with pytest.raises(CheckpointError, match="has no checkpoint yet"):
            load_model(run)

    def test_beside_the_process_that_owns_it_and_without_changing_anything(self, run):
        damaged = largest_file(run, 30)
        damaged.write_bytes(b"other")
        with owned(run):
            before = tree(run)
            assert load_model(run, report=lambda message: None).step == 20
            assert tree(run) == before

    @pytest.mark.parametrize("moment", ["before its files are compared", "before its arrays are read"])
    def test_a_checkpoint_that_is_removed_meanwhile(self, run, model, monkeypatch, moment):
        """The run saves step 40 and removes all others, while 30 is being read."""
        name = "verify" if "compared" in moment else "restore_arrays"
        owner = Manifest if "compared" in moment else checkpoint
        function = getattr(owner, name)

        def removed(*arguments, **settings):
            if (run / "checkpoints/30").exists():
                checkpoints = Checkpoints(Workdir(run), CONFIG, print)
                save(checkpoints, 40, times(model, 4))
                checkpoints.close()
                for step in (20, 30):
                    shutil.rmtree(run / f"checkpoints/{step}")
            return function(*arguments, **settings)

        monkeypatch.setattr(owner, name, removed)
        said = []
        assert load_model(run, report=said.append).step == 40
        assert said == [f"{run / 'checkpoints/30'} was removed while it was read: its run goes on; looking again"]

    def test_a_certain_step_that_is_removed_meanwhile(self, run, monkeypatch):
        def removed(*arguments, **settings):
            shutil.rmtree(run / "checkpoints/20")
            return verify(*arguments, **settings)

        verify = Manifest.verify
        monkeypatch.setattr(Manifest, "verify", removed)
        with pytest.raises(CheckpointError, match=r"no checkpoint of step 20; it has \[10, 30\]"):
            load_model(run, step=20, report=lambda message: None)

    def test_all_damaged(self, run):
        for step in (10, 20, 30):
            largest_file(run, step).unlink()
        with pytest.raises(CheckpointError, match="no good checkpoint"):
            load_model(run, report=lambda message: None)

    def test_bytes_of_the_optimizer_are_compared_by_those_who_go_on_with_the_run(self, run, model):
        file = run / "checkpoints/30/optimizer/manifest.ocdbt"
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        reported = []
        loaded = load_model(run, report=reported.append)
        assert (loaded.step, reported) == (30, [])
        assert_is_multiple(loaded.model, model, 30)
        file.unlink()
        assert load_model(run, report=reported.append).step == 20
        assert "optimizer/manifest.ocdbt is missing; trying the one before" in reported[0]
