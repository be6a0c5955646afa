"""Traces of chosen steps: `training.profile_step` and `profile_num_steps`."""

import jax
import pytest

from rat_jax.training import train
from rat_jax.training.profile import StepProfile
from tests.stopped_run import assert_same_run
from tests.tiny_run import tiny_config


@pytest.fixture
def done(monkeypatch):
    """What was done, in order."""
    happened = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: happened.append(f"start {folder.name}"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: happened.append("stop"))
    return happened


def profile(tmp_path, done, start=0, **changes):
    config = tiny_config("data", training__profile_step=3, training__profile_num_steps=2, **changes)
    return StepProfile(config.training, tmp_path / "profile", start, done.append)


def run_steps(traced, done, steps):
    for step in steps:
        traced.before(step)
        done.append(f"step {step}")
        traced.after(step, lambda: done.append("wait"))
    traced.close()


def test_steps_are_traced_to_their_ends(tmp_path, done):
    run_steps(profile(tmp_path, done), done, range(1, 6))
    said = f"a trace of steps 3 to 4 is in {tmp_path / 'profile'}"
    steps = ["start profile", "step 3", "step 4", "wait", "stop", said]
    assert done == ["step 1", "step 2", *steps, "step 5"]


def test_a_run_that_ends_meanwhile_ends_the_trace(tmp_path, done):
    run_steps(profile(tmp_path, done), done, [1, 2, 3])
    assert done[2:5] == ["start profile", "step 3", "stop"]


def test_steps_before_a_start_are_not_traced(tmp_path, done):
    run_steps(profile(tmp_path, done, start=3), done, [4, 5])
    assert done == ["step 4", "step 5"]


def test_a_trace_that_cannot_be_written_does_not_end_a_run(tmp_path, done, monkeypatch):
    def refuse(folder):
        raise RuntimeError("another trace is being written")

    monkeypatch.setattr(jax.profiler, "start_trace", refuse)
    run_steps(profile(tmp_path, done), done, [3, 4])
    assert done == ["there is no trace of steps 3 to 4: another trace is being written", "step 3", "step 4"]


@pytest.mark.slow
def test_a_run_is_the_same_with_a_trace(corpus, uninterrupted, tmp_path):
    config = tiny_config(corpus, training__profile_step=2, training__profile_num_steps=1)
    assert train(config, tmp_path / "run").finished
    assert_same_run(tmp_path / "run", uninterrupted)
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
