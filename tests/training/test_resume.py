"""A run that ended early and is started again equals the uninterrupted one, bit for bit."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import time

import pytest

from rat_jax.checkpoints.model_workdir import save_model
from rat_jax.checkpoints.store import load_model
from rat_jax.data.tokenizer import load_tokenizer
from rat_jax.training import TrainResult, loop, train
from tests.stopped_run import Killed, assert_same_run, figures, kill, stop_at, tree
from tests.tiny_run import NUM_STEPS, tiny_config, train_command

REPOSITORY = pathlib.Path(__file__).parents[2]


class TestResume:
    """The same command again."""

    # Every second step is saved: from nothing, from step 2 and from step 4, before a save and behind one.
    @pytest.mark.parametrize(
        "step",
        [pytest.param(step, marks=[pytest.mark.slow] * (step in (2, 3, 6))) for step in range(1, NUM_STEPS + 1)],
    )
    def test_a_run_stopped_before_any_step_ends_like_one_that_was_not(
        self, config, uninterrupted, tmp_path, monkeypatch, step
    ):
        stop_at(monkeypatch, step, kill)
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
        monkeypatch.undo()
        assert train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_a_run_stopped_while_it_validates_repeats_the_validation(
        self, config, uninterrupted, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(loop, "batch_loss", lambda *arguments: kill())
        with pytest.raises(Killed):
            train(config, tmp_path / "run")
        monkeypatch.undo()
        train(config, tmp_path / "run")
        assert_same_run(tmp_path / "run", uninterrupted)

    # A SIGTERM ends a run in tests/training/test_evaluations.py too.
    @pytest.mark.parametrize("number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT])
    def test_a_signal_ends_the_run_after_a_checkpoint_of_that_step(
        self, config, uninterrupted, tmp_path, monkeypatch, number
    ):
        stop_at(monkeypatch, 3, lambda: os.kill(os.getpid(), number))
        result = train(config, tmp_path / "run")
        assert result == TrainResult(step=3, finished=False, validation_loss=None)
        assert load_model(tmp_path / "run").step == 3
        monkeypatch.undo()
        assert train(config, tmp_path / "run").finished
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
        assert train(config, tmp_path / "run").finished
        assert_same_run(tmp_path / "run", uninterrupted)

    def test_falls_back_to_the_checkpoint_before_a_damaged_one(self, config, finished_run, uninterrupted, capfd):
        array_file = max((finished_run / "checkpoints/6/params").rglob("d/*"), key=lambda path: path.stat().st_size)
        content = bytearray(array_file.read_bytes())
        content[len(content) // 2] ^= 1
        array_file.write_bytes(content)
        assert train(config, finished_run).finished
        said = capfd.readouterr().err
        assert "checkpoints/6 is damaged" in said
        assert "resuming from" in said
        assert_same_run(finished_run, uninterrupted)

    def test_a_finished_run_says_so_and_changes_nothing(self, config, finished_run, capfd):
        before = tree(finished_run)
        result = train(config, finished_run)
        assert result.finished
        assert "the run is finished, all 6 steps are done" in capfd.readouterr().err
        assert tree(finished_run) == before

    def test_a_finished_run_that_validated_on_other_tokens_validates_again(self, config, finished_run, uninterrupted):
        log = finished_run / "log.jsonl"
        records = [json.loads(line) for line in log.read_text().splitlines()]
        for record in records:
            record.pop("validation_fraction", None)
        log.write_text("".join(json.dumps(record) + "\n" for record in records))
        result = train(config, finished_run)
        last = json.loads(log.read_text().splitlines()[-1])
        assert (last["step"], last["validation_loss"]) == (NUM_STEPS, result.validation_loss)
        assert (NUM_STEPS, "validation_loss", result.validation_loss) in figures(uninterrupted)

    def test_starts_from_a_saved_model(self, config, corpus, uninterrupted, tmp_path):
        model = load_model(uninterrupted).model
        save_model(tmp_path / "run", config, model, 1000, load_tokenizer(corpus))
        changed = tiny_config(corpus, training__validation_batches=1)
        assert train(changed, tmp_path / "run").finished
        first_loss = figures(tmp_path / "run")[0]
        assert first_loss[:2] == (1, "loss")
        assert first_loss[2] < figures(uninterrupted)[0][2] - 0.3  # that of a model that was trained

    def test_free_fields_may_change(self, corpus, finished_run):
        changed = tiny_config(corpus, training__log_every_steps=3, training__checkpoints_to_keep=1)
        shutil.rmtree(finished_run / "checkpoints/6")
        assert train(changed, finished_run).finished
