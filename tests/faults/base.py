"""What faults are tried on: small corpora, a run that was stopped half way, and the same run never stopped."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil
from typing import Any, Literal

import jax
import numpy as np

from rat_jax.checkpoints.store import load_model
from rat_jax.config import Config
from rat_jax.data_config import CorpusConfig
from rat_jax.training import loop, train
from tests.tiny_run import make_corpus, tiny_config

NUM_STEPS, STOPPED_AT = 6, 4
# What a start says of the step that it begins at.
_BEGINNING = re.compile(
    r"resuming from \S*/checkpoints/(\d+)|^steps +(\d+) of \d+ done|is finished, all (\d+) steps are done", re.MULTILINE
)
EXACT_FIGURES = ("loss", "grad_norm", "param_norm", "learning_rate", "num_targets", "validation_loss")


Reads = Literal["corpus", "mixture", "packed"]
ROW_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Base:
    """Folders that faults get copies of.

    Runs read a corpus, a mixture of it and another one, or its documents packed into rows.
    """

    path: pathlib.Path
    reads: Reads = "corpus"

    @property
    def data(self) -> pathlib.Path:
        return self.path / "data"

    @property
    def corpus(self) -> pathlib.Path:
        return self.data / "corpus"

    @property
    def stopped(self) -> pathlib.Path:
        return self.path / "stopped"

    @property
    def whole(self) -> pathlib.Path:
        return self.path / "whole"

    def config(self, data: pathlib.Path) -> Config:
        """Of a run that reads the folders of `data`, a copy of the base's."""
        config = tiny_config(
            data / "corpus",
            model__pattern=("rnn", "local_attention"),
            training__num_steps=NUM_STEPS,
            data__seq_len=ROW_TOKENS,
        )
        if self.reads != "mixture":
            return config
        corpora = {"one": CorpusConfig(str(data / "corpus"), 3.0), "two": CorpusConfig(str(data / "other/corpus"), 1.0)}
        return dataclasses.replace(config, data=dataclasses.replace(config.data, path="", corpora=corpora))

    def prepare(self, data: pathlib.Path, **changes: Any) -> None:
        """Prepares what the runs read; `changes` are arguments of `make_corpus` for the first corpus."""
        if self.reads == "packed":  # documents of 21 ids, their ends included: rows of 16 have padding
            changes = {"packing": "best_fit", "seq_len": ROW_TOKENS, "line_ids": 20} | changes
        make_corpus(data, **changes)
        if self.reads == "mixture":
            make_corpus(data / "other", num_ids=900, line_ids=17)

    @classmethod
    def make(cls, path: pathlib.Path, reads: Reads = "corpus") -> "Base":
        """Prepares and trains; a folder that is there already is used as it is."""
        base = cls(path, reads)
        if not (path / "ready").is_file():
            base.prepare(base.data)
            config = base.config(base.data)
            train(config, base.whole)
            stop_after(config, base.stopped, STOPPED_AT)
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
    """What a run reads and a stopped run, to damage."""
    data, workdir = folder / "data", folder / "run"
    shutil.copytree(base.data, data)
    shutil.copytree(base.stopped, workdir)
    return data, workdir
