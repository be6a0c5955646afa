"""Bad batches: a skipped one leaves no trace in the state, others stop the run, and all are written down."""

import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import ConfigError, TrainingConfig
from rat_jax.data.pipeline import TrainData
from rat_jax.files import FileError
from rat_jax.sharding import global_batch, make_mesh
from rat_jax.training import BadBatchesError, NonFiniteError, loop, run, train
from rat_jax.training.guards import Guard
from rat_jax.training.step import initial_state, train_step
from tests.tiny_run import NUM_STEPS, tiny_config

SPIKES = {"training__on_spike": "skip", "training__spike_factor": 1.05, "training__spike_window_steps": 2}


def spoil(monkeypatch, spoiled, *, stop_before=None):
    """Has batches spoiled, by step counted from 1; a signal comes before a certain step."""

    def spoiled_step(graphdef, optimizer, num_steps, state, batch, max_loss):
        step = int(state.step) + 1
        if step == stop_before:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(graphdef, optimizer, num_steps, state, spoiled.get(step, lambda x: x)(batch), max_loss)

    monkeypatch.setattr(loop, "train_step", spoiled_step)


def no_number(batch):
    return batch._replace(loss_weights=batch.loss_weights * jnp.nan)


def other_targets(batch):
    return batch._replace(targets=(batch.targets + 1) % 29)


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def logged(workdir):
    names = ("step", "loss", "grad_norm", "param_norm", "learning_rate", "mean_loss", "skipped_steps")
    return [{name: record.get(name) for name in names} for record in lines(workdir / "log.jsonl")]


class TestStep:
    """The step as a function."""

    @pytest.mark.parametrize(("spoil", "limit"), [(no_number, np.inf), (lambda batch: batch, 1.0)])
    def test_a_skipped_step_changes_nothing_but_the_count(self, corpus, spoil, limit):
        config = tiny_config(corpus)
        mesh = make_mesh(config.mesh)
        data = TrainData(config.data, vocab_size=29, seed=0)
        with jax.set_mesh(mesh):
            graphdef = abstract_model(config.model)[0]
            batch = global_batch(next(data), mesh)
            step = jax.tree_util.Partial(train_step, graphdef, config.optimizer, NUM_STEPS)
            state, metrics = step(initial_state(config, mesh), batch, np.float32(np.inf))
            assert metrics.updated
            before = jax.tree.map(np.array, state)
            state, metrics = step(state, spoil(batch), np.float32(limit))
        data.close()
        assert not metrics.updated
        assert int(state.step) == int(before.step) + 1
        for name in ("params", "opt_state"):
            then, now = (jax.tree.leaves(getattr(s, name)) for s in (before, state))
            for a, b in zip(then, now, strict=True):
                np.testing.assert_array_equal(a, b)
        assert np.isfinite(metrics.param_norm)


class TestRun:
    """Runs with bad batches in them."""

    @pytest.mark.parametrize(
        ("spoiled", "changes", "skipped"),
        [
            pytest.param(
                {3: no_number, 4: no_number},
                {"training__on_non_finite": "skip"},
                [3, 4],
                id="not finite",
                marks=pytest.mark.slow,  # a spike has a state beside, and is skipped in the same way
            ),
            pytest.param({5: other_targets}, SPIKES, [5], id="spike"),
        ],
    )
    def test_skips_are_the_same_in_one_go_and_after_a_resume(
        self, corpus, tmp_path, monkeypatch, spoiled, changes, skipped
    ):
        config = tiny_config(corpus, **changes)
        spoil(monkeypatch, spoiled)
        assert train(config, tmp_path / "whole").finished
        spoil(monkeypatch, spoiled, stop_before=4)
        assert train(config, tmp_path / "parts").step == 4
        spoil(monkeypatch, spoiled)
        assert train(config, tmp_path / "parts").finished
        assert logged(tmp_path / "parts") == logged(tmp_path / "whole")
        assert lines(tmp_path / "parts/bad_batches.jsonl") == lines(tmp_path / "whole/bad_batches.jsonl")
        bad, data = lines(tmp_path / "whole/bad_batches.jsonl"), TrainData(config.data, vocab_size=29, seed=0)
        assert [(record["step"], record["batch"], record["action"]) for record in bad] == [
            (step, step - 1, "skipped") for step in skipped
        ]
        batches = [next(data) for _ in range(NUM_STEPS)]
        data.close()
        for record in bad:
            rows = data.sources[""].rows(record["records"])
            np.testing.assert_array_equal(rows.tokens, batches[record["batch"]].tokens)
        assert logged(tmp_path / "whole")[-2]["skipped_steps"] == len(skipped)

    def test_what_is_not_skipped_ends_the_run(self, corpus, tmp_path, monkeypatch):
        spoil(monkeypatch, {4: no_number})
        with pytest.raises(NonFiniteError, match=r"loss is nan at step 4; .*on_non_finite='skip'.*; step 2 is saved"):
            train(tiny_config(corpus), tmp_path / "run")
        (record,) = lines(tmp_path / "run/bad_batches.jsonl")
        assert (record["step"], record["loss"], record["action"]) == (4, None, "stopped")
        assert train(tiny_config(corpus, training__on_non_finite="skip"), tmp_path / "run").finished

    def test_what_cannot_be_written_down_ends_the_run_all_the_same(self, corpus, tmp_path, monkeypatch, capfd):
        def refuse(*arguments):
            raise FileError("bad_batches.jsonl cannot be written")

        monkeypatch.setattr(run, "write_bad_batch", refuse)
        spoil(monkeypatch, {4: no_number})
        with pytest.raises(NonFiniteError, match="step 2 is saved"):
            train(tiny_config(corpus), tmp_path / "run")
        assert "bad_batches.jsonl cannot be written; batch 3: stopped" in capfd.readouterr().err

    @pytest.mark.slow
    def test_too_many_in_a_row(self, corpus, tmp_path, monkeypatch):
        changes = {"training__on_non_finite": "skip", "training__max_skips_in_a_row": 2}
        spoil(monkeypatch, dict.fromkeys((3, 4, 5), no_number))
        with pytest.raises(BadBatchesError, match=r"at step 5, and the 2 steps before it were skipped, too"):
            train(tiny_config(corpus, **changes), tmp_path / "run")
        assert len(lines(tmp_path / "run/bad_batches.jsonl")) == 3

    def test_a_validation_loss_that_is_no_number_ends_the_run(self, corpus, tmp_path, monkeypatch):
        sums = loop.batch_loss
        monkeypatch.setattr(loop, "batch_loss", lambda *args: sums(*args)._replace(loss=jnp.float32(jnp.nan)))
        with pytest.raises(NonFiniteError, match=r"validation loss is nan after step 4; .*; step 4 is saved"):
            train(tiny_config(corpus), tmp_path / "run")
        assert "NaN" not in (tmp_path / "run/log.jsonl").read_text()

    @pytest.mark.slow
    def test_reported_spikes_change_nothing(self, corpus, tmp_path, monkeypatch, capfd):
        spoil(monkeypatch, {5: other_targets})
        assert train(tiny_config(corpus), tmp_path / "ignored").finished
        reporting = tiny_config(corpus, **SPIKES | {"training__on_spike": "report"})
        assert train(reporting, tmp_path / "reported").finished
        assert logged(tmp_path / "ignored") == logged(tmp_path / "reported")
        assert not (tmp_path / "ignored/bad_batches.jsonl").exists()
        (record,) = lines(tmp_path / "reported/bad_batches.jsonl")
        assert (record["step"], record["action"]) == (5, "reported")
        assert "at step 5, the median before it" in capfd.readouterr().err


class TestGuard:
    """The decisions, without a device."""

    def guard(self, notes=None, **changes):
        note = (lambda *note: None) if notes is None else (lambda *note: notes.append(note))
        return Guard(TrainingConfig(num_steps=1000, **changes), note)

    def feed(self, guard, losses, start=1):
        """The limits under which steps of these losses run, and what is skipped."""
        limits, skipped = [], []
        for step, loss in enumerate(losses, start):
            limits.append(float(guard.max_loss(step)))
            updated = loss <= limits[-1]
            guard.judge(step, {"loss": loss, "grad_norm": 1.0, "param_norm": 1.0}, updated=updated)
            if not updated:
                skipped.append(step)
        return limits, skipped

    def test_limits_against_a_loop(self):
        rng = np.random.default_rng(0)
        losses = (3 + rng.random(60)).astype(np.float32).astype(float)
        losses[rng.random(60) < 0.2] *= 3
        window, factor = 5, 1.5
        guard = self.guard(on_spike="skip", spike_factor=factor, spike_window_steps=window)
        limits, skipped = self.feed(guard, losses)
        taken = {}
        for step, loss in enumerate(losses, 1):
            known = [taken[s] for s in sorted(taken) if s <= step - 2][-window:]
            limit = factor * np.median(known) if len(known) == window else np.inf
            assert limits[step - 1] == pytest.approx(limit, rel=1e-6)
            assert (step in skipped) == (loss > limits[step - 1])
            if step not in skipped:
                taken[step] = loss
        assert 3 < len(skipped) == guard.num_skipped < 20

    @pytest.mark.parametrize("cut", [1, 2, 3, 7, 8, 30])
    def test_a_guard_goes_on_from_a_saved_state(self, cut):
        settings = {"on_spike": "skip", "spike_factor": 1.2, "spike_window_steps": 5}
        losses = list(3 + np.sin(np.arange(40) ** 2))
        whole = self.guard(**settings)
        expected = self.feed(whole, losses)
        first, second = self.guard(**settings), self.guard(**settings)
        parts = [self.feed(first, losses[:cut])]
        second.restore(json.loads(json.dumps(first.state())))
        parts.append(self.feed(second, losses[cut:], start=cut + 1))
        assert tuple(a + b for a, b in zip(*parts, strict=True)) == expected
        assert second.state() == whole.state()

    def test_settings_are_checked(self):
        with pytest.raises(ConfigError, match="spike_factor must be above 1, got 1"):
            TrainingConfig(num_steps=1, spike_factor=1.0)
        with pytest.raises(ConfigError, match="max_skips_in_a_row must be 1 or more, got 0"):
            TrainingConfig(num_steps=1, max_skips_in_a_row=0)
