"""Checkpoints: what was saved comes back, what was damaged is noticed."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints import store as checkpoint
from rat_jax.checkpoints.store import Checkpoints, Manifest, abstract_model, load_model, save_model
from rat_jax.checkpoints.workdir import CheckpointError, Workdir, check_same_model
from rat_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from rat_jax.model import LanguageModel
from tests.tiny_run import tiny_config

CONFIG = tiny_config("data", model__pattern=("rnn",), training__checkpoints_to_keep=3, training__num_steps=100)


def save(checkpoints, step, params):
    """Starts to save a step of a run whose optimizer's state is the step."""
    checkpoints.save(
        step, params, {"count": jnp.int32(step)}, {"next_batch": step, "fingerprint": {"seed": 0}}
    )


def new_run(folder):
    workdir = Workdir(folder)
    workdir.mark(CONFIG, None)
    return workdir


@pytest.fixture(scope="module")
def model():
    return LanguageModel(CONFIG.model, rngs=nnx.Rngs(0))


def times(model, factor):
    return jax.tree.map(lambda x: x * factor, nnx.state(model))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    """A workdir with checkpoints of steps 10, 20 and 30, whose parameters are multiples."""
    workdir = new_run(tmp_path_factory.mktemp("runs") / "run")
    checkpoints = Checkpoints(workdir, CONFIG, lambda message: None)
    for step in (10, 20, 30):
        save(checkpoints, step, times(model, step))
    checkpoints.close()
    return workdir.path


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def largest_file(run, step):
    files = (run / "checkpoints" / str(step) / "params").rglob("*")
    return max((file for file in files if file.is_file()), key=lambda file: file.stat().st_size)


def flip_bit(run):
    content = bytearray(largest_file(run, 30).read_bytes())
    content[len(content) // 3] ^= 4
    largest_file(run, 30).write_bytes(content)


def cut_short(run):
    content = largest_file(run, 30).read_bytes()
    largest_file(run, 30).write_bytes(content[: len(content) // 2])


def remove_file(run):
    largest_file(run, 30).unlink()


def remove_optimizer(run):
    shutil.rmtree(run / "checkpoints/30/optimizer")


def remove_manifest(run):
    (run / "checkpoints/30/manifest.json").unlink()


def tear_manifest(run):
    manifest = run / "checkpoints/30/manifest.json"
    manifest.write_text(manifest.read_text()[:200])


def empty_folder(run):
    shutil.rmtree(run / "checkpoints/30")
    (run / "checkpoints/30").mkdir()


DAMAGES = [flip_bit, cut_short, remove_file, remove_optimizer, remove_manifest, tear_manifest, empty_folder]


def assert_is_multiple(loaded, model, factor):
    for a, b in zip(jax.tree.leaves(nnx.state(loaded)), jax.tree.leaves(times(model, factor)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


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
        for name in ("num_kv_heads", "qk_norm", "mlp_kind", "scan_unroll"):
            del values["config"]["model"][name]
        del values["config"]["data"]["first_target_id"]
        file.write_text(json.dumps(values))
        loaded = load_model(run)
        assert loaded.step == 30
        check_same_model(loaded.config, CONFIG, run)
        other = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, mlp_kind="geglu"))
        with pytest.raises(CheckpointError, match=r"config\.model\.mlp_kind is 'gelu' there, 'geglu' now"):
            check_same_model(loaded.config, other, run)

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

    def test_all_damaged(self, run):
        for step in (10, 20, 30):
            largest_file(run, step).unlink()
        with pytest.raises(CheckpointError, match="no good checkpoint"):
            load_model(run, report=lambda message: None)


class TestCheckpoints:
    """Saving and going on."""

    def test_saves_what_was_there_although_the_arrays_are_donated(self, tmp_path):
        checkpoints = Checkpoints(new_run(tmp_path), CONFIG, lambda message: None)
        params = {"embedding": jnp.arange(1 << 20, dtype=jnp.float32)}
        expected = np.array(params["embedding"])
        step = jax.jit(lambda params: jax.tree.map(lambda x: x + 1, params), donate_argnums=0)
        save(checkpoints, 1, params)
        for _ in range(20):
            params = step(params)
        checkpoints.close()
        path, manifest = checkpoint.Checkpoints(Workdir(tmp_path), CONFIG, print).latest()
        target = jax.eval_shape(lambda: {"embedding": jnp.zeros((1 << 20,), jnp.float32)})
        target = checkpoint._placed(target, None)
        np.testing.assert_array_equal(checkpoints.restore(path, manifest, "params", target)["embedding"], expected)

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_latest_sets_damaged_ones_aside_so_that_their_step_can_be_saved(self, run, model, damage):
        damage(run)
        said = []
        checkpoints = Checkpoints(Workdir(run), CONFIG, said.append)
        path, manifest = checkpoints.latest()
        assert (path.name, manifest.step, manifest.data) == ("20", 20, {"next_batch": 20, "fingerprint": {"seed": 0}})
        assert "checkpoints/30" in said[0]
        save(checkpoints, 30, times(model, 3))
        checkpoints.close()
        assert_is_multiple(load_model(run).model, model, 3)

    def test_unfinished_saves_are_removed(self, run):
        partial = run / "checkpoints/40.orbax-checkpoint-tmp-1"
        partial.mkdir()
        assert Checkpoints(Workdir(run), CONFIG, print).latest()[1].step == 30
        assert not partial.exists()

    def test_refuses_to_start_anew_where_all_are_damaged(self, run):
        for step in (10, 20, 30):
            largest_file(run, step).unlink()
        for _ in range(2):
            with pytest.raises(CheckpointError, match="no good checkpoint is left"):
                Checkpoints(Workdir(run), CONFIG, lambda message: None).latest()

    def test_keeps_the_newest(self, run, model):
        said = []
        checkpoints = Checkpoints(Workdir(run), CONFIG, said.append)
        save(checkpoints, 40, times(model, 4))
        checkpoints.close()
        assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["20", "30", "40"]
        assert said == [f"saved {run / 'checkpoints/40'}"]

    def test_a_save_that_orbax_refuses_is_an_error(self, run, model):
        checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None)
        with pytest.raises(CheckpointError, match="was not saved"):
            save(checkpoints, 25, times(model, 1))
        checkpoints.close()

    def test_a_write_that_fails_in_the_background_is_an_error(self, run, model, monkeypatch):
        checkpoints = Checkpoints(Workdir(run), CONFIG, lambda message: None)

        def fail(self, path):
            raise OSError("No space left on device")

        monkeypatch.setattr(Manifest, "write", fail)
        save(checkpoints, 40, times(model, 1))
        with pytest.raises(CheckpointError, match="No space left on device"):
            checkpoints.close()
        monkeypatch.undo()
        assert load_model(run, report=lambda message: None).step == 30

    @pytest.mark.parametrize(
        "target",
        [
            {"count": jax.ShapeDtypeStruct((), jnp.float32)},
            {"count": jax.ShapeDtypeStruct((1,), jnp.int32)},
            {"number": jax.ShapeDtypeStruct((), jnp.int32)},
        ],
        ids=["dtype", "shape", "name"],
    )
    def test_other_arrays_are_refused(self, saved, target):
        checkpoints = Checkpoints(Workdir(saved), CONFIG, print)
        path, manifest = checkpoints.latest()
        with pytest.raises(CheckpointError, match="holds other arrays"):
            checkpoints.restore(path, manifest, "optimizer", target)

    def test_arrays_have_names_without_indices(self, saved):
        names = Manifest.read(saved / "checkpoints/30").arrays["params"]
        assert names["blocks.00_rnn.mixer.in_proj.kernel"] == [[2, 16, 48], "float32"]
        assert json.loads((saved / "checkpoints/30/manifest.json").read_text())["versions"]["jax"] == jax.__version__


class TestSaveModel:
    """Workdirs that hold a model only."""

    def test_round_trip(self, model, tmp_path):
        save_model(tmp_path / "run", CONFIG, model, 1234, ByteTokenizer())
        loaded = load_model(tmp_path / "run")
        assert loaded.step == 1234
        assert_is_multiple(loaded.model, model, 1)
        assert load_tokenizer(tmp_path / "run/tokenizer").hash == ByteTokenizer().hash

    def test_refuses_a_folder_that_is_not_empty_and_another_model(self, model, tmp_path):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(CheckpointError, match="not empty"):
            save_model(tmp_path, CONFIG, model, 0)
        with pytest.raises(CheckpointError, match=r"config\.model"):
            save_model(tmp_path / "run", tiny_config("data"), model, 0)
        assert not (tmp_path / "run").exists()


def test_abstract_model_has_the_shapes_of_the_model(model):
    abstract = jax.tree.map(lambda x: (x.shape, x.dtype), abstract_model(CONFIG.model)[1])
    assert abstract == jax.tree.map(lambda x: (x.shape, x.dtype), nnx.state(model))
