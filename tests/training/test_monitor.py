"""What is shown and logged of a run's speed."""

import jax.numpy as jnp
import pytest

from rat_jax.training import monitor
from rat_jax.training.guards import Guard
from rat_jax.training.step import StepMetrics
from tests.tiny_run import tiny_config


class Log:
    def __init__(self):
        self.records = {}

    def write(self, step, figures):
        self.records[step] = figures


def test_throughput_is_that_of_whole_intervals(monkeypatch):
    """Steps of 2 s; the figures of the first one, which compiles, arrive when the device is long past it."""
    config = tiny_config("corpus", training__num_steps=30, training__log_every_steps=5)
    seconds = [0.0]
    monkeypatch.setattr(monitor.time, "perf_counter", lambda: seconds[0])
    log = Log()
    progress = monitor.TrainMonitor(config, Guard(config.training, lambda *note: None), log, 0, 1000)
    one = jnp.float32(1)
    for done in range(1, 17):
        progress.step(done, StepMetrics(one, one, one, one, one, jnp.bool_(True)))  # handles the figures of done - 1
        seconds[0] = max(100.0, 90 + 2 * done)
        if done == 11:  # right after the record of step 10
            progress.settle()
            with progress.pause("saving"):
                seconds[0] += 1000
    progress.close()
    tokens = config.data.global_batch_size * config.data.seq_len
    assert sorted(log.records) == [5, 10, 15]
    assert "tokens_per_sec" not in log.records[5]
    assert log.records[10]["tokens_per_sec"] == pytest.approx(tokens / 2)


def test_figures_that_are_no_numbers_are_left_out(monkeypatch):
    config = tiny_config("corpus", training__log_every_steps=2, training__on_non_finite="skip")
    log = Log()
    progress = monitor.TrainMonitor(config, Guard(config.training, lambda *note: None), log, 0, 1000)
    for done, loss in ((1, 3.0), (2, jnp.nan)):
        one, loss = jnp.float32(1), jnp.float32(loss)
        progress.step(done, StepMetrics(loss, one, one, one, one, jnp.isfinite(loss)))
    progress.settle()
    progress.close()
    assert "loss" not in log.records[2]
    assert log.records[2]["mean_loss"] == 3.0
    assert log.records[2]["skipped_steps"] == 1
