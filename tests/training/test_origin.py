"""`config.init`: what a new run starts from is there to the last bit, what does not fit is refused by name."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints.arrays import named, restore_arrays
from rat_jax.checkpoints.manifest import Manifest
from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.run_log import read_log
from rat_jax.checkpoints.store import load_model
from rat_jax.checkpoints.weights import write_weights
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.data import DataError
from rat_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from rat_jax.model import LanguageModel
from rat_jax.paths import PathError
from rat_jax.release import ReleaseError, release_model_config, release_state_dict
from rat_jax.release.file import ReleaseFile, write_release_file
from rat_jax.sharding import make_mesh
from rat_jax.training import loop, train
from rat_jax.training.step import abstract_state, train_step
from tests.tiny_run import NUM_STEPS, make_corpus, tiny_config


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def old(corpus, tmp_path_factory):
    """The workdir of a finished run with checkpoints of steps 4 and 6."""
    workdir = tmp_path_factory.mktemp("runs") / "old"
    assert train(small(corpus), workdir).finished
    return workdir


@pytest.fixture(scope="module")
def old_model(old):
    return load_model(old).model


def small(corpus, **changes):
    return tiny_config(corpus, **{"model__pattern": ("rnn",), "model__num_layers": 1, "model__num_heads": 1, **changes})


def configure(corpus, path, **changes):
    return small(corpus, **{"init__path": str(path), **changes})


def first_state(config, workdir, monkeypatch):
    """The state before the first step, of a start that is killed there."""
    states = []

    def kill(graphdef, optimizer, num_steps, state, *rest):
        states.append(state)
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop, "train_step", kill)
        train(config, workdir)
    return states[0]


def saved(config, folder, step, item):
    """Arrays of a checkpoint, and their names."""
    path = folder / "checkpoints" / str(step)
    state = abstract_state(config, make_mesh(config.mesh))
    target = {"params": state.params, "optimizer": state.opt_state}[item]
    return named(restore_arrays(path / item, Manifest.read(path).arrays[item], target))


def assert_equal(tree, arrays):
    tree = named(tree)
    assert tree.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(tree[name], array)


def origin(workdir):
    return json.loads((workdir / "run.json").read_text())["origin"]


class TestStart:
    """From each kind, before the first step."""

    @pytest.mark.parametrize("step", [None, 4])
    def test_parameters_of_a_run(self, corpus, old, tmp_path, monkeypatch, capfd, step):
        config = configure(corpus, old, init__step=step, seed=1)
        state = first_state(config, tmp_path / "run", monkeypatch)
        place = old / "checkpoints" / str(step or NUM_STEPS)
        params = saved(config, old, place.name, "params")
        assert_equal(state.params, params)
        assert int(state.step) == 0
        assert all(not np.any(x) for x in jax.tree.leaves(state.opt_state))
        names = {"loaded": len(params), "missing": 0, "unused": []}
        note = {"kind": "checkpoint", "path": str(place), "step": int(place.name), "params": names, "optimizer": None}
        assert origin(tmp_path / "run") == note
        said = capfd.readouterr().err
        where = f"starting from the model of step {place.name} in {place}"
        assert f"{where}: {len(params)} arrays loaded, 0 missing, 0 unused\n" in said
        assert "the optimizer starts anew\n" in said

    def test_the_optimizer_of_a_run(self, corpus, old, tmp_path, monkeypatch, capfd):
        config = configure(corpus, old, init__optimizer=True, training__num_steps=4)
        state = first_state(config, tmp_path / "run", monkeypatch)
        arrays = saved(config, old, NUM_STEPS, "optimizer")
        assert int(arrays["learning_rate.count"]) == int(arrays["adam.count"]) == NUM_STEPS
        arrays["learning_rate.count"] = np.int32(0)  # the schedule is the new run's
        assert_equal(state.opt_state, arrays)
        assert_equal(state.params, saved(config, old, NUM_STEPS, "params"))
        assert int(state.step) == 0
        unused = {"loaded": len(arrays) - 1, "missing": 0, "unused": ["learning_rate.count"]}
        assert origin(tmp_path / "run")["optimizer"] == unused
        said = f"{len(arrays) - 1} arrays loaded, 0 missing, 1 unused (learning_rate.count); the schedule begins anew"
        assert said in capfd.readouterr().err

    def test_a_model_alone(self, corpus, old_model, tmp_path, monkeypatch):
        config = small(corpus)
        save_model(tmp_path / "model", config, old_model, 1000, load_tokenizer(corpus))
        state = first_state(configure(corpus, tmp_path / "model"), tmp_path / "run", monkeypatch)
        assert_equal(state.params, named(nnx.state(old_model)))
        assert origin(tmp_path / "run")["step"] == 1000

    def test_weights(self, corpus, old_model, tmp_path, monkeypatch):
        config = small(corpus)
        write_weights(tmp_path / "weights", config, old_model, 5, load_tokenizer(corpus), shard_bytes=5000)
        state = first_state(configure(corpus, tmp_path / "weights"), tmp_path / "run", monkeypatch)
        assert_equal(state.params, named(nnx.state(old_model)))
        note = origin(tmp_path / "run")
        assert (note["kind"], note["step"], note["params"]["loaded"]) == ("weights", 5, len(named(state.params)))

    def test_a_file_of_the_release(self, corpus, old_model, tmp_path, monkeypatch):
        arrays, values = release_state_dict(old_model), release_model_config(old_model.config, 16)
        write_release_file(tmp_path / "rnn.pth", ReleaseFile(arrays, values, 9))
        config = configure(corpus, tmp_path / "rnn.pth", model__dtype="bfloat16", model__remat="block")
        state = first_state(config, tmp_path / "run", monkeypatch)
        assert_equal(state.params, named(nnx.state(old_model)))
        note = origin(tmp_path / "run")
        assert (note["kind"], note["step"], note["params"]["loaded"]) == ("release", 9, len(arrays))

    def test_grouped_heads_from_weights_in_bfloat16(self, corpus, tmp_path, monkeypatch):
        changes = {"model__pattern": ("rattention",), "model__num_heads": 2, "model__num_kv_heads": 1}
        config = small(corpus, **changes)
        model = LanguageModel(config.model, rngs=nnx.Rngs(3))
        write_weights(tmp_path / "weights", config, model, 0, dtype="bfloat16")
        state = first_state(configure(corpus, tmp_path / "weights", **changes), tmp_path / "run", monkeypatch)
        rounded = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), nnx.state(model))
        assert_equal(state.params, named(rounded))

    def test_no_init_is_noted_as_none(self, old):
        assert origin(old) is None

    def test_a_damaged_checkpoint_is_walked_over_and_left(self, corpus, old, tmp_path, monkeypatch, capfd):
        source = shutil.copytree(old, tmp_path / "source")
        (source / "checkpoints/6/params/_METADATA").write_text("{")
        first_state(configure(corpus, source), tmp_path / "run", monkeypatch)
        assert "checkpoints/6 is damaged" in capfd.readouterr().err
        assert origin(tmp_path / "run")["step"] == 4
        assert (source / "checkpoints/6").is_dir()


class TestResume:
    """Once something is saved, the origin is history."""

    def test_a_killed_start_reads_it_again_and_a_resumed_one_does_not(self, corpus, old, tmp_path, monkeypatch):
        source = shutil.copytree(old, tmp_path / "source")
        config = configure(corpus, source, init__optimizer=True)
        uninterrupted = tmp_path / "uninterrupted"
        train(config, uninterrupted)
        assert read_log(uninterrupted / "log.jsonl")[0]["loss"] < read_log(old / "log.jsonl")[0]["loss"] - 0.3

        first_state(config, tmp_path / "run", monkeypatch)  # nothing is saved

        def kill_at_five(graphdef, optimizer, num_steps, state, *rest):
            if int(state.step) == 4:
                raise Killed
            return train_step(graphdef, optimizer, num_steps, state, *rest)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(loop, "train_step", kill_at_five)
            train(config, tmp_path / "run")
        shutil.rmtree(source)
        assert train(config, tmp_path / "run").finished
        models = [nnx.state(load_model(workdir).model) for workdir in (tmp_path / "run", uninterrupted)]
        assert_equal(models[0], named(models[1]))
        assert origin(tmp_path / "run") == origin(uninterrupted)

    def test_another_origin_is_another_run(self, corpus, old, tmp_path):
        run = shutil.copytree(old, tmp_path / "run")
        with pytest.raises(CheckpointError, match=r"another config: config\.init\.path is None there, '/x' now"):
            train(configure(corpus, "/x"), run)

    def test_more_steps_by_the_flags_that_the_refusal_gives(self, corpus, old, tmp_path, monkeypatch):
        run = shutil.copytree(old, tmp_path / "run")
        with pytest.raises(CheckpointError, match="num_steps is 6 there, 10 now") as caught:
            train(small(corpus, training__num_steps=10), run)
        flags = dict(word[2:].split("=") for word in str(caught.value).split() if word.startswith("--config."))
        assert flags.pop("config.init.optimizer") == "True"
        assert flags.pop("config.training.num_steps") == "4"
        config = configure(corpus, flags.pop("config.init.path"), init__optimizer=True, training__num_steps=4)
        assert not flags
        first_state(config, tmp_path / "more", monkeypatch)

    def test_a_start_from_a_saved_model_takes_no_second_one(self, corpus, old, old_model, tmp_path):
        save_model(tmp_path / "run", small(corpus), old_model, 0, load_tokenizer(corpus))
        with pytest.raises(CheckpointError, match=r"a model to start from, and config\.init\.path names another"):
            train(configure(corpus, old), tmp_path / "run")


class TestRefusals:
    """Before anything is written."""

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"init__step": 5}, r"has no checkpoint of step 5; it has \[4, 6\]"),
            (
                {"model__mlp_width": 64},
                r"old/checkpoints/6 holds another model: config\.model\.mlp_width is 32 there, 64",
            ),
            (
                {"model__rnn": {"max_timescale": 8}},
                r"config\.model\.rnn\.max_timescale is 16 there, 8 now\. Set it to what it is",
            ),
            (
                {"model__qk_norm": True, "model__num_layers": 4},
                r"config\.model\.qk_norm is False there, True now; config\.model\.num_layers is 1 there",
            ),
            ({"init__path": "gs://bucket/run"}, r"config\.init\.path is 'gs://bucket/run': gs:// is not read directly"),
        ],
    )
    def test_a_run(self, corpus, old, tmp_path, changes, message):
        with pytest.raises((CheckpointError, PathError), match=message) as caught:
            train(configure(corpus, old, **changes), tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "run").exists()

    def test_equal_models_that_are_written_differently(self, corpus, old, tmp_path, monkeypatch):
        config = configure(corpus, old, model__num_kv_heads=1, model__scan_unroll=2)
        first_state(config, tmp_path / "run", monkeypatch)

    def test_what_is_nothing_to_start_from(self, corpus, old_model, tmp_path):
        (tmp_path / "empty").mkdir()
        (tmp_path / "text.pth").write_text("no archive")
        write_weights(tmp_path / "weights", small(corpus), old_model, 0)
        save_model(tmp_path / "model", small(corpus), old_model, 0, load_tokenizer(corpus))
        for name, changes, message in (
            ("none", {}, r"config\.init\.path is '.*none', which is not there"),
            ("empty", {}, "is no workdir and no folder of safetensors files"),
            ("text.pth", {}, "is damaged, or not a file of torch.save"),
            ("text.pth", {"init__step": 3}, r"config\.init\.step is 3, and config\.init\.path .* is no workdir"),
            ("weights", {"init__step": 0}, r"config\.init\.step is 0, and config\.init\.path .* is no workdir"),
            ("weights", {"init__optimizer": True}, "holds no optimizer's state: set config.init.optimizer to False"),
            ("model", {"init__optimizer": True}, "model/checkpoints/0 holds no optimizer's state"),
        ):
            with pytest.raises((CheckpointError, ReleaseError), match=message):
                train(configure(corpus, tmp_path / name, **changes), tmp_path / "run")
            assert not (tmp_path / "run").exists()

    def test_another_tokenizer(self, corpus, old_model, tmp_path):
        config = small(corpus)
        save_model(tmp_path / "model", config, old_model, 0, ByteTokenizer())
        write_weights(tmp_path / "weights", config, old_model, 0, ByteTokenizer())
        for name in ("model", "weights"):
            with pytest.raises(DataError, match=f"another tokenizer than the model's, which is in .*{name}/tokenizer"):
                train(configure(corpus, tmp_path / name), tmp_path / "run")

    def test_damaged_weights(self, corpus, old_model, tmp_path):
        write_weights(tmp_path / "weights", small(corpus), old_model, 0)
        content = bytearray((tmp_path / "weights/model.safetensors").read_bytes())
        content[-1] ^= 1
        (tmp_path / "weights/model.safetensors").write_bytes(content)
        with pytest.raises(CheckpointError, match="is damaged: its content has changed"):
            train(configure(corpus, tmp_path / "weights"), tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_a_damaged_note_is_refused(old, tmp_path):
    run = shutil.copytree(old, tmp_path / "run")
    values = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(values | {"origin": "x"}))
    with pytest.raises(CheckpointError, match="origin must be an object or null, got 'x'"):
        Workdir(run).record()
    del values["origin"]  # as it was before it was noted
    (run / "run.json").write_text(json.dumps(values))
    assert Workdir(run).record().origin is None
