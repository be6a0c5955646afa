"""The training loop: what it says and logs, and figures that stop it."""

import json
import re
import traceback

import jax
import jax.numpy as jnp
import pytest

from rat_jax.checkpoints.store import Checkpoints, load_model
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import ValidationData
from rat_jax.errors import RunStopped
from rat_jax.evaluation import evaluate
from rat_jax.program import exit_code
from rat_jax.sharding import make_mesh
from rat_jax.training import NonFiniteError, loop, train
from rat_jax.training.step import train_step
from tests.stopped_run import assert_same_run, figures, stop_at
from tests.tiny_run import NUM_STEPS, tiny_config


class TestReports:
    """What a run says and logs."""

    def test_log_and_messages(self, config, corpus, uninterrupted, tmp_path, capfd):
        train(tiny_config(corpus, training__log_every_steps=3), tmp_path / "run")
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
        for record in records:
            shares = [value for name, value in record.items() if name.startswith("time_share_")]
            assert ("loss" in record) == bool(shares) and sum(shares) == pytest.approx(float(bool(shares)))
        assert re.search(r"time went to .*steps \d+\.\d%", said)

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


class TestSaves:
    """When a run saves."""

    def test_by_time_too(self, corpus, uninterrupted, tmp_path, monkeypatch):
        seconds = [0.0]

        def step(*arguments):
            seconds[0] += 25.0
            return train_step(*arguments)

        saved = []
        save = Checkpoints.save

        def note(checkpoints, done, *arguments):
            saved.append(done)
            save(checkpoints, done, *arguments)

        monkeypatch.setattr(loop, "monotonic", lambda: seconds[0])
        monkeypatch.setattr(loop, "train_step", step)
        monkeypatch.setattr(Checkpoints, "save", note)
        often = {"training__checkpoint_every_minutes": 1, "training__checkpoint_every_steps": 4}
        assert train(tiny_config(corpus, **often), tmp_path / "run").finished
        assert saved == [3, 4, 6]  # after 75 s; of step 4 as of the last whatever the time
        monkeypatch.undo()
        assert_same_run(tmp_path / "run", uninterrupted)


class TestBadFigures:
    """Losses that are no numbers, and devices that are too small."""

    def test_non_finite_loss_stops_and_leaves_the_last_good_checkpoint(self, config, tmp_path, monkeypatch):
        def poisoned(graphdef, optimizer, num_steps, state, batch, max_loss):
            if int(state.step) == 3:
                batch = batch._replace(loss_weights=batch.loss_weights * jnp.nan)
            return train_step(graphdef, optimizer, num_steps, state, batch, max_loss)

        monkeypatch.setattr(loop, "train_step", poisoned)
        with pytest.raises(NonFiniteError, match="loss is nan at step 4"):
            train(config, tmp_path / "run")
        assert load_model(tmp_path / "run").step == 2
        assert (tmp_path / "run/loss_curve.png").is_file()

    def test_out_of_memory_says_what_to_change(self, config, tmp_path, monkeypatch, capfd):
        def refuse():
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 byte")

        stop_at(monkeypatch, 2, refuse)
        with pytest.raises(RunStopped, match="a device has too little memory, see above; no step was saved yet"):
            train(config, tmp_path / "run")
        said = capfd.readouterr().err
        for words in ("GiB for gradients and activations", "accumulation_steps, now 1", "remat, now 'none'", "fsdp"):
            assert words in said

    def test_a_device_that_fails_is_a_trace_that_ends_with_what_is_saved(
        self, config, uninterrupted, tmp_path, monkeypatch
    ):
        def fail():
            raise jax.errors.JaxRuntimeError("INTERNAL: the device is lost")

        stop_at(monkeypatch, 6, fail)  # step 5 was done, but nothing of it is to be relied on
        with pytest.raises(jax.errors.JaxRuntimeError, match="the device is lost") as caught:
            exit_code(lambda: train(config, tmp_path / "run").step)
        monkeypatch.undo()
        printed = "".join(traceback.format_exception(caught.value)).splitlines()
        assert "the device is lost" in "".join(printed)
        assert printed[-1] == "step 4 is saved, and the same command resumes there"
        assert load_model(tmp_path / "run").step == 4
        assert train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)
