"""Runs of a test that end before a chosen step, and comparing what runs have written."""

import functools
import json

import jax
import numpy as np
from flax import nnx

from rat_jax.checkpoints.store import load_model
from rat_jax.training import loop
from rat_jax.training.step import train_step
from tests.tiny_run import NUM_STEPS

EXACT_FIGURES = ("loss", "grad_norm", "param_norm", "learning_rate", "num_targets", "validation_loss")


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


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

    monkeypatch.setattr(loop, "train_step", step_or_stop)


def kill():
    raise Killed


def tree(folder):
    """Every file of a folder with its content."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
