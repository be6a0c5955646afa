"""The training loop: resume equals the uninterrupted run, bad input is refused, bad figures stop it."""

import errno
import functools
import json
import math
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.checkpoints.manifest import Manifest
from rat_jax.checkpoints.owner import owned
from rat_jax.checkpoints.run_log import RunLog
from rat_jax.checkpoints.store import load_model, save_model
from rat_jax.checkpoints.workdir import CheckpointError, Workdir
from rat_jax.config import ConfigError, config_to_dict
from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus, Statistics
from rat_jax.data.pipeline import TrainData, ValidationData
from rat_jax.data.token_file import TokenFileWriter
from rat_jax.data.tokenizer import load_tokenizer
from rat_jax.errors import RunStopped
from rat_jax.evaluation import evaluate
from rat_jax.files import FileError
from rat_jax.sharding import global_batch, make_mesh
from rat_jax.training import NonFiniteError
from rat_jax.training import run as training
from rat_jax.training.step import batch_loss, initial_state, train_step
from tests.commands import call_script, run_script
from tests.tiny_run import NUM_STEPS, make_corpus, tiny_config

REPOSITORY = pathlib.Path(__file__).parents[2]
DEFAULT_CONFIG = f"--config={REPOSITORY / 'configs/default.py'}"
EXACT_FIGURES = ("loss", "grad_norm", "param_norm", "learning_rate", "num_targets", "validation_loss")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(corpus):
    return tiny_config(corpus)


@pytest.fixture(scope="module")
def uninterrupted(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert training.train(config, workdir).finished
    return workdir


@pytest.fixture
def finished_run(uninterrupted, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(uninterrupted, tmp_path / "run")


def figures(workdir):
    """All logged figures that two runs must share, by step and name."""
    records = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return [(r["step"], name, r[name]) for r in records for name in EXACT_FIGURES if name in r]


load_once = functools.cache(load_model)  # of the run that all others are compared with


def assert_same_run(workdir, other):
    assert figures(workdir) == figures(other)
    models = load_model(workdir), load_once(other)
    assert models[0].step == models[1].step == NUM_STEPS
    for a, b in zip(*(jax.tree.leaves(nnx.state(loaded.model)) for loaded in models), strict=True):
        np.testing.assert_array_equal(a, b)


def stop_at(monkeypatch, step, stop):
    """Has `stop` called before optimizer step `step`, counted from 1."""

    def step_or_stop(graphdef, optimizer, num_steps, state, *rest):
        if int(state.step) + 1 == step:
            stop()
        return train_step(graphdef, optimizer, num_steps, state, *rest)

    monkeypatch.setattr(training, "train_step", step_or_stop)


def kill():
    raise Killed


def tree(folder):
    """Every file of a folder with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class TestResume:
    """The same command again."""

    @pytest.mark.parametrize("step", range(1, NUM_STEPS + 1))
    def test_a_run_stopped_before_any_step_ends_like_one_that_was_not(
        self, config, uninterrupted, tmp_path, monkeypatch, step
    ):
        stop_at(monkeypatch, step, kill)
        with pytest.raises(Killed):
            training.train(config, tmp_path / "run")
        monkeypatch.undo()
        assert training.train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_a_run_stopped_while_it_validates_repeats_the_validation(
        self, config, uninterrupted, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(training, "batch_loss", lambda *arguments: kill())
        with pytest.raises(Killed):
            training.train(config, tmp_path / "run")
        monkeypatch.undo()
        training.train(config, tmp_path / "run")
        assert_same_run(tmp_path / "run", uninterrupted)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_a_signal_ends_the_run_after_a_checkpoint_of_that_step(
        self, config, uninterrupted, tmp_path, monkeypatch, number
    ):
        stop_at(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
        result = training.train(config, tmp_path / "run")
        assert result == training.TrainResult(step=3, finished=False, validation_loss=None)
        assert load_model(tmp_path / "run").step == 3
        monkeypatch.undo()
        assert training.train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_killed_process(self, config, uninterrupted, tmp_path):
        """SIGKILL at no certain point, in processes of their own; the last start gets as far as it takes."""
        command = train_command(tmp_path, config)
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        log = tmp_path / "run" / "log.jsonl"
        while not (log.is_file() and len(log.read_text().splitlines()) >= 3):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        assert training.train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_falls_back_to_the_checkpoint_before_a_damaged_one(self, config, finished_run, uninterrupted, capfd):
        array_file = max((finished_run / "checkpoints/6/params").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(array_file.read_bytes())
        content[len(content) // 2] ^= 1
        array_file.write_bytes(content)
        assert training.train(config, finished_run).finished
        said = capfd.readouterr().err
        assert "checkpoints/6 is damaged" in said
        assert "going on from" in said
        assert_same_run(finished_run, uninterrupted)

    def test_a_finished_run_says_so_and_changes_nothing(self, config, finished_run, capfd):
        before = tree(finished_run)
        result = training.train(config, finished_run)
        assert result.finished
        assert "the run is finished, all 6 steps are done" in capfd.readouterr().err
        assert tree(finished_run) == before

    def test_a_finished_run_that_validated_on_other_tokens_validates_again(self, config, finished_run, uninterrupted):
        log = finished_run / "log.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()]
        for record in records:
            record.pop("validation_fraction", None)
        log.write_text("".join(json.dumps(record) + "\n" for record in records))
        result = training.train(config, finished_run)
        last = json.loads(log.read_text().splitlines()[-1])
        assert (last["step"], last["validation_loss"]) == (NUM_STEPS, result.validation_loss)
        assert (NUM_STEPS, "validation_loss", result.validation_loss) in figures(uninterrupted)

    def test_starts_from_a_saved_model(self, config, corpus, uninterrupted, tmp_path):
        model = load_model(uninterrupted).model
        save_model(tmp_path / "run", config, model, 1000, load_tokenizer(corpus))
        changed = tiny_config(corpus, training__validation_batches=1)
        assert training.train(changed, tmp_path / "run").finished
        first_loss = figures(tmp_path / "run")[0]
        assert first_loss[:2] == (1, "loss")
        assert first_loss[2] < figures(uninterrupted)[0][2] - 0.3  # that of a model that was trained

    def test_free_fields_may_change(self, corpus, finished_run):
        changed = tiny_config(corpus, training__log_every_steps=3, training__checkpoints_to_keep=1)
        shutil.rmtree(finished_run / "checkpoints/6")
        assert training.train(changed, finished_run).finished


class TestWorkdir:
    """One owner, nothing lost, and the system's refusals."""

    def test_a_second_start_is_refused_and_changes_nothing(self, config, finished_run):
        shutil.rmtree(finished_run / "checkpoints/6")
        with owned(finished_run):
            before = tree(finished_run)
            with pytest.raises(CheckpointError, match=rf"in use by process {os.getpid()} .*nothing was changed"):
                training.train(config, finished_run)
            assert tree(finished_run) == before
        assert training.train(config, finished_run).finished

    def test_a_start_while_a_step_is_done(self, config, tmp_path, monkeypatch):
        def second():
            before = tree(tmp_path / "run")
            with pytest.raises(CheckpointError, match="is in use by process"):
                training.train(config, tmp_path / "run")
            assert tree(tmp_path / "run") == before

        stop_at(monkeypatch, 2, second)  # before a checkpoint is written in the background
        assert training.train(config, tmp_path / "run").finished
        assert not (tmp_path / "run/owner.json").exists()

    def test_bad_lines_in_the_log_do_not_stop_a_run(self, config, finished_run, uninterrupted, capfd):
        shutil.rmtree(finished_run / "checkpoints/6")
        log = finished_run / "log.jsonl"
        lines = log.read_bytes().splitlines(keepends=True)
        log.write_bytes(b"".join([lines[0], b"\n", lines[1], b"\xff\x00\n", *lines[2:], b'{"step": 6, "lo']))
        assert training.train(config, finished_run).finished
        assert "log.jsonl: no record is in line 2, 4, " in capfd.readouterr().err
        assert_same_run(finished_run, uninterrupted)

    def test_a_run_whose_checkpoints_are_gone_is_not_started_over(self, config, finished_run):
        shutil.rmtree(finished_run / "checkpoints")
        before = tree(finished_run)
        with pytest.raises(CheckpointError, match=r"no good checkpoint is left in .*, though step 6 was"):
            training.train(config, finished_run)
        assert tree(finished_run) == before

    @pytest.mark.parametrize("name", ["mark", "save_tokenizer"])
    def test_a_kill_at_the_very_first_write(self, config, uninterrupted, tmp_path, monkeypatch, name):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Workdir, name, lambda *arguments: kill())
            training.train(config, tmp_path / "run")
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run/run.json.partial").write_text("{")
        assert training.train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_a_save_that_fails_stops_the_run_and_says_what_is_kept(self, config, uninterrupted, tmp_path, monkeypatch):
        write = Manifest.write

        def fail(self, path):
            if self.step == 4:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, path)

        monkeypatch.setattr(Manifest, "write", fail)
        message = (
            r"checkpoints/4 could not be written: No space left on device; make room on its disk; step 2 is saved, and "
            r"the same command resumes there$"
        )
        with pytest.raises(RunStopped, match=message):
            training.train(config, tmp_path / "run")
        monkeypatch.undo()
        assert training.train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_a_log_that_cannot_be_written_stops_the_run(self, config, tmp_path, monkeypatch):
        append = RunLog.append

        def fail(self, step, figures):
            if step == 4:
                raise FileError("log.jsonl cannot be written: No space left on device")
            append(self, step, figures)

        monkeypatch.setattr(RunLog, "append", fail)
        with pytest.raises(RunStopped, match="No space left on device; step 4 is saved"):
            training.train(config, tmp_path / "run")
        assert load_model(tmp_path / "run").step == 4

    def test_data_that_is_damaged_in_mid_run_stops_it(self, config, tmp_path, monkeypatch):
        def fail():
            raise DataError("id 31 is outside the vocabulary of 29")

        stop_at(monkeypatch, 2, fail)
        with pytest.raises(RunStopped, match="outside the vocabulary of 29; no step was saved yet"):
            training.train(config, tmp_path / "run")

    def test_a_relative_data_path_is_found_from_everywhere(self, corpus, uninterrupted, tmp_path, monkeypatch):
        monkeypatch.chdir(corpus.parent)
        training.train(tiny_config(corpus.name), tmp_path / "run")
        monkeypatch.chdir(tmp_path)
        loaded = load_model("run")
        assert loaded.config.data.path == str(corpus)
        assert json.loads((tmp_path / "run/run.json").read_text())["config"]["data"]["path"] == str(corpus)

    @pytest.mark.parametrize("place", ["file", "file/run", "link"])
    def test_places_where_nothing_can_be(self, config, tmp_path, place):
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "nowhere")
        with pytest.raises((CheckpointError, FileError)) as caught:
            training.train(config, tmp_path / place)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link"]


class TestReports:
    """What a run says and logs."""

    def test_log_and_messages(self, config, corpus, uninterrupted, tmp_path, capfd):
        training.train(tiny_config(corpus, training__log_every_steps=3), tmp_path / "run")
        records = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
        losses = [value for _, name, value in figures(uninterrupted) if name == "loss"]
        means = [(record["step"], record["mean_loss"]) for record in records if "mean_loss" in record]
        assert means == [(3, pytest.approx(sum(losses[:3]) / 3)), (6, pytest.approx(sum(losses[3:]) / 3))]
        data = ValidationData(config.data, vocab_size=29)
        assert {record.get("validation_fraction") for record in records} == {None, 2 * 8 / data.num_records}
        said = capfd.readouterr().err
        for program in ("training step", "validation loss"):
            assert f"compiling the {program}" in said
            assert re.search(rf"compiled the {program} in \d+\.\d s\n", said)
            assert said.count(f"compiling the {program}") == 1
        coverage = f"on {100 * 16 / data.num_records:.3g} % of the validation split, evenly spread"
        assert said.count(coverage) == 3  # of two validations and of the report

    def test_the_validation_loss_is_that_of_the_evaluation(self, config, corpus, uninterrupted):
        mesh = make_mesh(config.mesh)
        loaded = load_model(uninterrupted, mesh=mesh)
        rows = config.data.global_batch_size * config.data.seq_len
        result = evaluate(
            loaded,
            Corpus.open(corpus),
            mesh,
            config.data.seq_len,
            batch_tokens=rows,
            max_batches=config.training.validation_batches,
        )
        (logged,) = [v for step, name, v in figures(uninterrupted) if (step, name) == (NUM_STEPS, "validation_loss")]
        assert result.loss == pytest.approx(logged, rel=1e-6)


class TestRefusals:
    """Bad input, before anything is written."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"training__num_steps": 7}, r"config\.training\.num_steps is 6 there, 7 now"),
            ({"model__width": 32}, r"config\.model\.width is 16 there, 32 now"),
            ({"seed": 1}, r"config\.seed is 0 there, 1 now"),
            ({"data__seq_len": 8}, r"config\.data\.seq_len is 16 there, 8 now"),
        ],
    )
    def test_workdir_of_another_config(self, corpus, finished_run, change, message):
        before = tree(finished_run)
        with pytest.raises(CheckpointError, match=message):
            training.train(tiny_config(corpus, **change), finished_run)
        assert tree(finished_run) == before

    @pytest.mark.parametrize(("split", "field"), [("train", "content_hash"), ("validation", "validation_content_hash")])
    def test_other_data_of_the_same_path_field(self, finished_run, tmp_path, split, field):
        other = Corpus.open(make_corpus(tmp_path / "other"))
        ids = other.token_file(split).read(0, other.splits[split].num_tokens).copy()
        ids[0] = 1 + ids[0] % 28
        writer = TokenFileWriter(other.path / f"{split}.bin", other.tokenizer())
        writer.append(ids, other.splits[split].num_documents)
        writer.close()
        other.write_metadata()
        before = tree(finished_run)
        with pytest.raises(DataError, match=f"other batches: {field} was"):
            training.train(tiny_config(other.path), finished_run)
        assert tree(finished_run) == before

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_changed_data(self, finished_run, tmp_path, split):
        other = make_corpus(tmp_path / "other")
        content = bytearray((other / f"{split}.bin").read_bytes())
        content[8192 + 40] ^= 1
        (other / f"{split}.bin").write_bytes(content)
        before = tree(finished_run)
        for workdir in (finished_run, tmp_path / "new"):
            with pytest.raises(DataError, match=rf"{split}\.bin: block 0 of 1 \(bytes 8192 to \d+\) is not what was"):
                training.train(tiny_config(other), workdir)
        assert tree(finished_run) == before
        assert not (tmp_path / "new").exists()

    def test_other_tokenizer(self, config, corpus, uninterrupted, tmp_path):
        from rat_jax.data.tokenizer import IdTokenizer

        save_model(tmp_path / "run", config, load_model(uninterrupted).model, 0, IdTokenizer(29, 28))
        with pytest.raises(DataError, match="another tokenizer"):
            training.train(config, tmp_path / "run")

    def test_foreign_workdir(self, config, tmp_path):
        (tmp_path / "thesis.txt").write_text("mine")
        with pytest.raises(CheckpointError, match=r"not the workdir of a run: it has no run\.json"):
            training.train(config, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"data__path": "nowhere"}, DataError, "nowhere is not a prepared corpus"),
            ({"model__vocab_size": 30}, DataError, "vocabulary of 29, but the model's is 30"),
            ({"mesh__data": 3}, ConfigError, r"mesh\.data 3 .* do not multiply to the 1 devices"),
            ({"training__wandb_project": "rat"}, ConfigError, "Weights & Biases is not installed"),
        ],
    )
    def test_settings(self, corpus, tmp_path, monkeypatch, change, error, message):
        monkeypatch.setitem(sys.modules, "wandb", None)
        with pytest.raises(error, match=message):
            training.train(tiny_config(corpus, **change), tmp_path / "run")
        assert not (tmp_path / "run").exists()


class TestBadFigures:
    """Losses that are no numbers, and devices that are too small."""

    def test_non_finite_loss_stops_and_leaves_the_last_good_checkpoint(self, config, tmp_path, monkeypatch):
        def poisoned(graphdef, optimizer, num_steps, state, batch, max_loss):
            if int(state.step) == 3:
                batch = batch._replace(loss_weights=batch.loss_weights * jnp.nan)
            return train_step(graphdef, optimizer, num_steps, state, batch, max_loss)

        monkeypatch.setattr(training, "train_step", poisoned)
        with pytest.raises(NonFiniteError, match="loss is nan at step 4"):
            training.train(config, tmp_path / "run")
        assert load_model(tmp_path / "run").step == 2
        assert (tmp_path / "run/loss_curve.png").is_file()

    def test_out_of_memory_says_what_to_change(self, config, tmp_path, monkeypatch, capfd):
        def refuse():
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

        stop_at(monkeypatch, 2, refuse)
        with pytest.raises(RunStopped, match="a device has too little memory, see above; no step was saved yet"):
            training.train(config, tmp_path / "run")
        said = capfd.readouterr().err
        for words in ("GiB for gradients and activations", "accumulation_steps, now 1", "remat, now 'none'", "fsdp"):
            assert words in said


class TestTrainStep:
    """The step as a function."""

    @pytest.fixture
    def batch(self, config):
        data = TrainData(config.data, vocab_size=config.model.vocab_size, seed=0)
        batch = next(data)
        data.close()
        weights = batch.loss_weights.copy()
        weights[:3, ::2] = 0  # rows of unequal weight, so that a mean of means would differ
        return batch._replace(loss_weights=weights)

    def run(self, corpus, batch, num_parts):
        config = tiny_config(corpus, optimizer__accumulation_steps=num_parts)
        mesh = make_mesh(config.mesh)
        with jax.set_mesh(mesh):
            graphdef = training.abstract_model(config.model)[0]
            state = initial_state(config, mesh)
            return train_step(graphdef, config.optimizer, 6, state, global_batch(batch, mesh))

    def test_accumulation_changes_nothing(self, corpus, batch):
        whole, whole_metrics = self.run(corpus, batch, 1)
        for num_parts in (2, 4):
            parts, metrics = self.run(corpus, batch, num_parts)
            np.testing.assert_allclose(metrics.loss, whole_metrics.loss, rtol=1e-6)
            np.testing.assert_allclose(metrics.grad_norm, whole_metrics.grad_norm, rtol=1e-5)
            for a, b in zip(
                jax.tree.leaves(parts.opt_state["adam"].mu), jax.tree.leaves(whole.opt_state["adam"].mu), strict=True
            ):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7)

    def test_loss_is_the_mean_over_targets(self, config, corpus, batch):
        _, metrics = self.run(corpus, batch, 1)
        mesh = make_mesh(config.mesh)
        graphdef = training.abstract_model(config.model)[0]
        model = nnx.merge(graphdef, initial_state(config, mesh).params)
        logits = jax.jit(type(model).__call__)(model, batch.tokens, batch.segment_ids)
        log_probs = jax.nn.log_softmax(logits)
        losses = -np.take_along_axis(np.asarray(log_probs), batch.targets[..., None], axis=-1)[..., 0]
        expected = (losses * batch.loss_weights).sum() / batch.loss_weights.sum()
        np.testing.assert_allclose(metrics.loss, expected, rtol=1e-5)
        assert metrics.num_targets == batch.loss_weights.sum()

    def test_a_batch_without_targets_has_no_loss_and_no_gradient(self, corpus, batch):
        _, metrics = self.run(corpus, batch._replace(loss_weights=np.zeros_like(batch.loss_weights)), 1)
        assert metrics.loss == metrics.grad_norm == metrics.num_targets == 0

    def test_a_second_run_of_the_same_shapes_compiles_nothing(self, config, uninterrupted, tmp_path):
        compiled = train_step._cache_size(), batch_loss._cache_size()
        training.train(config, tmp_path / "run")
        assert (train_step._cache_size(), batch_loss._cache_size()) == compiled


def test_bits_per_byte_at_the_end_of_a_run_are_those_of_the_corpus(capsys):
    statistics = Statistics(num_documents=3, num_tokens=20, num_bytes=33, byte_entropy_nats=2.0)
    run = types.SimpleNamespace(
        config=tiny_config("nowhere"),
        corpus=types.SimpleNamespace(splits={"validation": statistics}, total=statistics),
        validation=types.SimpleNamespace(fraction=1.0),
    )
    training._Run._report(run, 3.0)
    nats = 3.0 * 17 / 33
    assert f"{nats:.4f} nats a byte, {nats / math.log(2):.4f} bits a byte\n" in capsys.readouterr().err
    run.config = tiny_config("nowhere", data__first_target_id=3)  # not the loss of the text
    training._Run._report(run, 3.0)
    assert "a byte" not in capsys.readouterr().err


class TestCommand:
    """train.py."""

    def test_an_error_has_no_traceback_and_exits_with_2(self, tmp_path):
        done = run_script("train.py", DEFAULT_CONFIG, f"--workdir={tmp_path / 'run'}", "--config.model.wdth=3")
        assert done.returncode == 2
        assert done.stderr == "error: config has no field model.wdth; did you mean config.model.width?\n"
        assert not (tmp_path / "run").exists()

    def test_data_that_is_not_there_is_such_an_error(self, tmp_path, capsys):
        arguments = [DEFAULT_CONFIG, f"--workdir={tmp_path / 'run'}", "--config.data.path=nowhere"]
        assert call_script("train.py", *arguments) == 2
        nowhere = pathlib.Path("nowhere").absolute()
        assert capsys.readouterr().err.startswith(f"error: {nowhere} is not a prepared corpus")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("flag", "message"),
        [
            ("--workdir=gs://bucket/run", "--workdir is 'gs://bucket/run': gs:// is not read directly"),
            ("--distributed", "--distributed: the other hosts were not found: "),
            ("--no_such_flag", "Unknown command line flag 'no_such_flag'"),
        ],
    )
    def test_flags_that_are_wrong_are_named(self, tmp_path, capsys, flag, message):
        assert call_script("train.py", DEFAULT_CONFIG, f"--workdir={tmp_path / 'run'}", flag) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}")
        assert error.count("\n") == 1
        assert not (tmp_path / "run").exists()

    def test_the_home_folder_is_understood(self, tmp_path, monkeypatch, capsys):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes.txt").write_text("mine")
        assert call_script("train.py", DEFAULT_CONFIG, "--workdir=~/full") == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'full'} is not the workdir of a run")

    def test_help_is_no_error(self, capsys):
        assert call_script("train.py", "--help") == 0
        printed = capsys.readouterr()
        assert printed.err == ""
        for part in ("Trains a model", "--workdir:", "--[no]distributed:"):
            assert part in printed.out


def train_command(folder, config):
    """The command of a run in `folder`/run."""
    file = folder / "config.py"
    file.write_text(
        f"from ml_collections import config_dict\n\n"
        f"def get_config():\n    return config_dict.ConfigDict({config_to_dict(config)!r})\n"
    )
    return [sys.executable, "train.py", f"--config={file}", f"--workdir={folder / 'run'}"]
