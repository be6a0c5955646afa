"""A training run: from a config and a workdir to the last checkpoint, going on where an earlier start ended."""

import contextlib
import dataclasses
import pathlib
import sys

import jax
import numpy as np
import tqdm

from rat_jax.checkpoints.owner import Owner, owned
from rat_jax.checkpoints.run_log import read_log
from rat_jax.checkpoints.store import Checkpoints, Manifest, abstract_model
from rat_jax.checkpoints.workdir import (
    CheckpointError,
    Workdir,
    check_same_model,
    check_same_run,
    with_absolute_paths,
)
from rat_jax.config import Config
from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus
from rat_jax.data.pipeline import TrainData, ValidationData, check_fingerprint, describe_coverage
from rat_jax.errors import RunStopped
from rat_jax.files import FileError
from rat_jax.paths import local_path
from rat_jax.sharding import check_divides, global_batch, make_mesh
from rat_jax.training.metrics import MetricLog, check_wandb
from rat_jax.training.monitor import TrainMonitor
from rat_jax.training.oom import explain_out_of_memory, is_out_of_memory
from rat_jax.training.preemption import Preemption
from rat_jax.training.step import TrainState, abstract_state, batch_loss, initial_state, train_step


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How far a run has come."""

    step: int  # optimizer steps done
    finished: bool  # False: a signal ended it before the last step; the same command resumes
    validation_loss: float | None  # after the last step, on `training.validation_batches`; None if not finished


def train(config: Config, workdir: pathlib.Path | str) -> TrainResult:
    """Trains, or resumes training, in a workdir; see `rat_jax.checkpoints.workdir` for what it then holds.

    Raises:
      ConfigError, CheckpointError, DataError, FileError: if something does not fit, or another process owns the
        workdir, before anything is written.
      RunStopped: if the system or damaged data end it later; the message says which step is saved.
      NonFiniteError: if the loss or its gradient is no finite number; checkpoints of earlier steps remain.
    """
    workdir = Workdir(local_path(workdir, "workdir"))
    config = with_absolute_paths(config)
    check_wandb(config)
    workdir.is_new()  # what is no run's is left before anything is written there
    with owned(workdir.path) as owner:
        return _train(config, workdir, owner)


def _train(config: Config, workdir: Workdir, owner: Owner | None) -> TrainResult:
    checkpoints = Checkpoints(workdir, config, _say, owner)
    newest = None if workdir.is_new() else checkpoints.peek()
    if newest is not None:
        _check_fits(newest, config, workdir)
    corpus = Corpus.open(config.data.path)
    if newest is not None:
        corpus.check_tokenizer(workdir.tokenizer)

    mesh = make_mesh(config.mesh)
    check_divides(config, mesh)
    data = TrainData(config.data, vocab_size=config.model.vocab_size, seed=config.seed)
    validation = ValidationData(
        config.data, vocab_size=config.model.vocab_size, max_batches=config.training.validation_batches
    )
    if newest is not None and newest.data is not None:
        check_fingerprint(newest.data["fingerprint"], data.fingerprint)
    try:
        with jax.set_mesh(mesh):
            return _Run(config, workdir, checkpoints, corpus, mesh, data, validation).finish()
    finally:
        data.close()


class _Run:
    """A run whose settings were found to fit."""

    def __init__(self, config, workdir, checkpoints, corpus, mesh, data, validation):
        self.config: Config = config
        self.workdir: Workdir = workdir
        self.checkpoints: Checkpoints = checkpoints
        self.corpus: Corpus = corpus
        self.mesh: jax.sharding.Mesh = mesh
        self.data: TrainData = data
        self.validation: ValidationData = validation
        self.graphdef = abstract_model(config.model)[0]

    def finish(self) -> TrainResult:
        """Does the steps that remain."""
        state, start = self._restore()
        num_steps = self.config.training.num_steps
        loss = _validation_loss(self.workdir, num_steps)
        if start >= num_steps and loss is not None:
            _say(f"{self.workdir.path}: the run is finished, all {num_steps} steps are done")
            self._report(loss)
            return TrainResult(num_steps, True, loss)
        is_first_host = jax.process_index() == 0
        if is_first_host:
            self.workdir.mark(self.config, self.checkpoints.saved_step)
            self.workdir.save_tokenizer(self.corpus.tokenizer())
        num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
        _say(_summary(self.config, self.mesh, num_parameters, start))
        log = MetricLog(self.workdir, self.config, start, _say) if is_first_host else None
        progress = TrainMonitor(self.config, log, start, num_parameters)
        try:
            with contextlib.ExitStack() as stack:  # closes each, from the last to the first, also if another fails
                stack.callback(self.checkpoints.close)
                if log is not None:
                    stack.callback(log.close)
                stack.callback(progress.close)
                with Preemption() as preemption:
                    result = self._loop(state, start, progress, preemption)
        except jax.errors.JaxRuntimeError as error:
            if is_out_of_memory(error):
                _say(explain_out_of_memory(self.config, self.mesh, self.graphdef))
            raise
        except (CheckpointError, DataError, FileError) as error:
            raise RunStopped(f"{error}; {self._kept()}") from error
        if result.finished:
            self._report(result.validation_loss)
        return result

    def _kept(self) -> str:
        """What a run that ends too early leaves."""
        step = self.checkpoints.saved_step
        if not step:
            return "no step was saved yet"
        return f"step {step} is saved, and the same command goes on from there"

    def _restore(self) -> tuple[TrainState, int]:
        """The state to resume from, and the steps it has done."""
        found = self.checkpoints.latest()
        if found is None:
            return initial_state(self.config, self.mesh), 0
        path, manifest = found
        target = abstract_state(self.config, self.mesh)
        params = self.checkpoints.restore(path, manifest, "params", target.params)
        if manifest.data is None:
            _say(f"starting from the model in {path}")
            return initial_state(self.config, self.mesh, params), 0
        self.data.restore(manifest.data)
        opt_state = self.checkpoints.restore(path, manifest, "optimizer", target.opt_state)
        if manifest.step < self.config.training.num_steps:
            _say(f"going on from {path}")
        step = jax.device_put(np.int32(manifest.step), target.step.sharding)
        return TrainState(step, params, opt_state), manifest.step

    def _loop(self, state: TrainState, start: int, progress: TrainMonitor, preemption: Preemption) -> TrainResult:
        training = self.config.training
        done, saved, loss = start, start, None
        validated = _validation_loss(self.workdir, start) is not None  # else a kill came between the two
        while True:
            if done > saved and (done == training.num_steps or done % training.checkpoint_every_steps == 0):
                self._save(done, state, progress)
                saved = done
            is_due = done == training.num_steps or (done > 0 and done % training.validate_every_steps == 0)
            if is_due and not validated:
                loss = self._validate(done, state, progress, preemption)
            if done == training.num_steps and loss is not None:
                return TrainResult(done, True, loss)
            if preemption.agreed(done, training.log_every_steps):
                if done > saved:
                    self._save(done, state, progress)
                self.checkpoints.wait()
                progress.say(f"interrupted after step {done}; the same command resumes there")
                return TrainResult(done, False, None)
            batch = global_batch(next(self.data), self.mesh)
            with progress.calling("training step"):
                state, metrics = train_step(self.graphdef, self.config.optimizer, training.num_steps, state, batch)
            done, validated = done + 1, False
            progress.step(done, metrics)

    def _save(self, done: int, state: TrainState, progress: TrainMonitor) -> None:
        progress.settle()  # nothing is saved after a step that was not finite
        with progress.pause():
            self.checkpoints.save(done, state.params, state.opt_state, self.data.state())

    def _validate(self, done: int, state: TrainState, progress: TrainMonitor, preemption: Preemption) -> float | None:
        """Mean loss of the validation data; None if a signal came meanwhile."""
        progress.settle()
        sums = []
        with progress.pause():
            for batch in self.validation:
                if jax.process_count() == 1 and preemption.requested:
                    return None
                with progress.calling("validation loss"):
                    sums.append(batch_loss(self.graphdef, state.params, global_batch(batch, self.mesh)))
            loss = sum(float(part.loss) for part in sums) / sum(float(part.weight) for part in sums)
        progress.validation(done, loss, self.validation.fraction)
        return loss

    def _report(self, loss: float) -> None:
        """Compares the last validation loss with the entropy of single bytes."""
        entropy = self.corpus.total.byte_entropy_nats
        _say(f"validation loss {loss:.4f} nats a token, on {describe_coverage(self.validation.fraction)}")
        if entropy is None:
            return
        is_bytes = self.corpus.tokenizer().kind == "bytes"
        per_byte = loss if is_bytes else loss / self.corpus.splits["validation"].bytes_per_token
        if not is_bytes:
            _say(f"validation loss {per_byte:.4f} nats a byte")
        _say(f"byte-unigram entropy of the corpus {entropy:.4f} nats: the loss is {per_byte / entropy:.1%} of it")


def _check_fits(newest: Manifest, config: Config, workdir: Workdir) -> None:
    if newest.data is None:
        check_same_model(newest.config, config, workdir.path)
    else:
        check_same_run(newest.config, config, workdir.path)


def _validation_loss(workdir: Workdir, step: int) -> float | None:
    """What the log says of a step. Losses without `validation_fraction` are of other tokens, to be measured again."""
    losses = [
        record["validation_loss"]
        for record in read_log(workdir.log_file)
        if record["step"] == step and "validation_fraction" in record and "validation_loss" in record
    ]
    return losses[-1] if losses else None


def _summary(config: Config, mesh: jax.sharding.Mesh, num_parameters: int, start: int) -> str:
    device = mesh.devices.flat[0]
    model, data = config.model, config.data
    return "\n".join(
        [
            f"devices     {mesh.size} x {device.device_kind}, data {mesh.shape['data']}, fsdp {mesh.shape['fsdp']}",
            f"parameters  {num_parameters:,}",
            f"model       {model.num_layers} layers of {', '.join(model.pattern)}; width {model.width}, "
            f"{model.num_heads} heads, vocabulary {model.vocab_size}, {model.dtype}",
            f"data        {data.path}: {data.global_batch_size} sequences of {data.seq_len} tokens a step",
            f"steps       {start} of {config.training.num_steps} done",
        ]
    )


def _say(message: str) -> None:
    if jax.process_index() == 0:
        tqdm.tqdm.write(message, file=sys.stderr)  # above a bar, if there is one
