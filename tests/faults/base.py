"""What faults are tried on: a small corpus, a run that was stopped half way, and the same run never stopped."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any

import jax
import numpy as np

from rat_jax.checkpoints.store import load_model
from rat_jax.config import Config
from rat_jax.training import loop, train
from tests.tiny_run import make_corpus, tiny_config

NUM_STEPS, STOPPED_AT = 6, 4
# What a start says of the step that it begins at.
_BEGINNING = re.compile(
    r"resuming from \S*/checkpoints/(\d+)|^steps +(\d+) of \d+ done|is finished, all (\d+) steps are done", re.MULTILINE
)
EXACT_FIGURES = ("loss", "grad_norm", "param_norm", "learning_rate", "num_targets", "validation_loss")


@dataclasses.dataclass(frozen=True)
class Base:
    """Folders that faults get copies of."""

    path: pathlib.Path

    @property
    def corpus(self) -> pathlib.Path:
        return self.path / "data/corpus"

    @property
    def stopped(self) -> pathlib.Path:
        return self.path / "stopped"

    @property
    def whole(self) -> pathlib.Path:
        return self.path / "whole"

    def config(self, corpus: pathlib.Path) -> Config:
        return tiny_config(corpus, model__pattern=("rnn", "local_attention"), training__num_steps=NUM_STEPS)

    @classmethod
    def make(cls, path: pathlib.Path) -> "Base":
        """Prepares and trains; a folder that is there already is used as it is."""
        base = cls(path)
        if not (path / "ready").is_file():
            make_corpus(path / "data")
            train(base.config(base.corpus), base.whole)
            stop_after(base.config(base.corpus), base.stopped, STOPPED_AT)
            (path / "ready").touch()
        return base


class Stopped(BaseException):
    """A kill in this process: nothing catches it."""


def stop_after(config: Config, workdir: pathlib.Path, step: int) -> None:
    """Trains as far as `step`, and ends there as a kill would."""
    original = loop.train_step

    def step_or_stop(graphdef, *arguments):
        if any(int(state.step) == step for state in arguments if hasattr(state, "step")):
            raise Stopped
        return original(graphdef, *arguments)

    loop.train_step = step_or_stop
    try:
        train(config, workdir)
    except Stopped:
        return
    finally:
        loop.train_step = original
    raise AssertionError("the run was not stopped")


def begun_at(said: str) -> int | None:
    """The step that a start went on from, as it says itself; None: it did not come so far."""
    steps = [int(number) for found in _BEGINNING.findall(said) for number in found if number]
    return min(steps, default=None)


def differences(workdir: pathlib.Path, other: pathlib.Path, *, logged_from: int = 0) -> str | None:
    """How the end of a run differs from another's, bit for bit; None: it does not.

    So do the figures logged after the step `logged_from`, and those before it that are there.
    """
    left, right = figures(workdir), figures(other)
    right = {key: value for key, value in right.items() if key in left or key[0] > logged_from}
    if left != right:
        return f"the log has {sorted(left.items() ^ right.items())[:3]}"
    models = load_model(workdir, report=lambda line: None), load_model(other, report=lambda line: None)
    if models[0].step != models[1].step:
        return f"the last checkpoint is of step {models[0].step}, not {models[1].step}"
    leaves = [jax.tree.leaves_with_path(jax.tree.map(np.asarray, dict(_flat(model.model)))) for model in models]
    for (name, a), (_, b) in zip(*leaves, strict=True):
        if not np.array_equal(a, b):
            return f"{name} has other values"
    return None


def figures(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    """All logged figures that two runs must share, by step and name."""
    found = {}
    for line in (workdir / "log.jsonl").read_text(errors="replace").splitlines():
        record = _record(line)
        found |= {(record["step"], name): record[name] for name in EXACT_FIGURES if name in record}
    return found


def _record(line: str) -> dict[str, Any]:
    """What a line of a log holds; nothing if it is a damaged one, as a run leaves them that has nothing to log."""
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            return record
    return {}


def _flat(model):
    from flax import nnx

    return nnx.to_pure_dict(nnx.state(model)).items()


def copy(base: Base, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """A corpus and a stopped run to damage."""
    corpus, workdir = folder / "corpus", folder / "run"
    shutil.copytree(base.corpus, corpus)
    shutil.copytree(base.stopped, workdir)
    return corpus, workdir
