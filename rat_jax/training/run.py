"""A training run: from a config and a workdir to the last checkpoint, going on where an earlier start ended."""

import contextlib
import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

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
from rat_jax.data.integrity import WHOLE_BYTES
from rat_jax.data.pipeline import TrainData, ValidationData, check_fingerprint, describe_coverage
from rat_jax.data.workers import check_main
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.files import FileError, explain
from rat_jax.interrupts import Interrupts, caught
from rat_jax.memory import is_out_of_memory
from rat_jax.paths import local_path
from rat_jax.sharding import check_divides, global_batch, make_mesh
from rat_jax.training.guards import Guard, write_bad_batch
from rat_jax.training.metrics import MetricLog, check_wandb
from rat_jax.training.monitor import TrainMonitor, say
from rat_jax.training.oom import explain_out_of_memory
from rat_jax.training.origin import Origin, open_origin
from rat_jax.training.preemption import agreed
from rat_jax.training.step import TrainState, abstract_state, batch_loss, initial_state, train_step


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How far a run has come."""

    step: int  # optimizer steps done
    finished: bool  # False: a signal ended it before the last step; the same command resumes
    validation_loss: float | None  # after the last step, on `training.validation_batches`; None if not finished


def train(config: Config, workdir: pathlib.Path | str) -> TrainResult:
    """Trains, or resumes training, in a workdir; see `rat_jax.checkpoints.workdir` for what it then holds.

    A signal (SIGINT, SIGTERM) ends it after the step that is under way, which is saved; before the first step of this
    start as `rat_jax.interrupts.caught` says.

    Raises:
      ConfigError, CheckpointError, DataError, ReleaseError, FileError: if something does not fit, or another process
        owns the workdir, before anything is written.
      RunStopped: if what had begun cannot go on; the message says why, and which step is saved. NonFiniteError is of
        this kind: the loss or its gradient is no finite number.
    """
    check_main(config.data.num_workers)
    with caught() as interrupts:
        return _start(with_absolute_paths(config), Workdir(local_path(workdir, "workdir")), interrupts)


def _start(config: Config, workdir: Workdir, interrupts: Interrupts) -> TrainResult:
    check_wandb(config)
    workdir.is_new()  # what is no run's is left before anything is written there
    with owned(workdir.path) as owner:
        return _train(config, workdir, owner, interrupts)


def _train(config: Config, workdir: Workdir, owner: Owner | None, interrupts: Interrupts) -> TrainResult:
    checkpoints = Checkpoints(workdir, config, say, owner)
    newest = None if workdir.is_new() else checkpoints.peek()
    if newest is not None:
        _check_fits(newest, config, workdir)
    corpus = Corpus.open(config.data.path)
    if newest is not None:
        corpus.check_tokenizer(workdir.tokenizer)

    mesh = make_mesh(config.mesh)
    check_divides(config, mesh)
    origin = open_origin(config, say) if newest is None else None
    if origin is not None and origin.tokenizer is not None:
        corpus.check_tokenizer(origin.tokenizer)
    data = TrainData(config.data, vocab_size=config.model.vocab_size, seed=config.seed)
    validation = ValidationData(
        config.data, vocab_size=config.model.vocab_size, max_batches=config.training.validation_batches
    )
    if newest is not None and newest.data is not None:
        check_fingerprint(newest.data["fingerprint"], data.fingerprint)
    try:
        corpus.verify(max_bytes=WHOLE_BYTES, say=say)
        with jax.set_mesh(mesh):
            return _Run(config, workdir, checkpoints, corpus, mesh, data, validation, origin).finish(interrupts)
    finally:
        data.close()


class _Run:
    """A run whose settings were found to fit."""

    def __init__(self, config, workdir, checkpoints, corpus, mesh, data, validation, origin):
        self.config: Config = config
        self.workdir: Workdir = workdir
        self.checkpoints: Checkpoints = checkpoints
        self.corpus: Corpus = corpus
        self.mesh: jax.sharding.Mesh = mesh
        self.data: TrainData = data
        self.validation: ValidationData = validation
        self.origin: Origin | None = origin
        self.graphdef = abstract_model(config.model)[0]
        self.guard = Guard(config.training, self._note_bad_batch)

    def finish(self, interrupts: Interrupts) -> TrainResult:
        """Does the steps that remain; where memory is lacking, says what to change."""
        try:
            return self._finish(interrupts)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                raise
            say(explain_out_of_memory(self.config, self.mesh, self.graphdef))
            raise RunStopped(f"a device has too little memory, see above; {self.kept()}") from error

    def _finish(self, interrupts: Interrupts) -> TrainResult:
        state, start, note = self._restore()
        num_steps = self.config.training.num_steps
        loss = _validation_loss(self.workdir, num_steps)
        if start >= num_steps and loss is not None:
            say(f"{self.workdir.path}: the run is finished, all {num_steps} steps are done")
            self._report(loss)
            return TrainResult(num_steps, True, loss)
        is_first_host = jax.process_index() == 0
        if is_first_host:
            self.workdir.mark(self.config, self.checkpoints.saved_step, note)
            self.workdir.save_tokenizer(self.corpus.tokenizer(), self.corpus.chat_template())
        num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
        say(_summary(self.config, self.mesh, num_parameters, start))
        log = MetricLog(self.workdir, self.config, start, say) if is_first_host else None
        progress = TrainMonitor(self.config, self.guard, log, start, num_parameters)
        try:
            with contextlib.ExitStack() as stack:  # closes each, from the last to the first, also if another fails
                stack.callback(self.checkpoints.close)
                if log is not None:
                    stack.callback(log.close)
                stack.callback(progress.close)
                result = _Loop(self, state, start, progress, interrupts).run()
        except (CheckpointError, DataError, FileError) as error:
            raise RunStopped(f"{error}; {self.kept()}") from error
        if result.finished:
            self._report(result.validation_loss)
        return result

    def kept(self) -> str:
        """What a run that ends too early leaves."""
        step = self.checkpoints.saved_step
        if not step:
            return "no step was saved yet"
        return f"step {step} is saved, and the same command resumes there"

    def _restore(self) -> tuple[TrainState, int, dict[str, Any] | None]:
        """The state to begin with, the steps it has done, and where a new run's state came from."""
        found = self.checkpoints.latest()
        if found is None:
            return self._begin()
        path, manifest = found
        target = abstract_state(self.config, self.mesh)
        params = self.checkpoints.restore(path, manifest, "params", target.params)
        if manifest.data is None:
            say(f"starting from the model in {path}")
            return initial_state(self.config, self.mesh, params), 0, None
        self.data.restore(manifest.data)
        if "guard" in manifest.data:  # runs of earlier versions had none
            self.guard.restore(manifest.data["guard"])
        opt_state = self.checkpoints.restore(path, manifest, "optimizer", target.opt_state)
        if manifest.step < self.config.training.num_steps:
            say(f"going on from {path}")
        step = jax.device_put(np.int32(manifest.step), target.step.sharding)
        return TrainState(step, params, opt_state), manifest.step, None

    def _begin(self) -> tuple[TrainState, int, dict[str, Any] | None]:
        """As `_restore`, of a run that has saved nothing yet."""
        origin, self.origin = self.origin or open_origin(self.config, say), None  # what it holds is not kept
        if origin is None:
            return initial_state(self.config, self.mesh), 0, None
        target = abstract_state(self.config, self.mesh)
        start = origin.load(target, self.config.init, say)
        if start.opt_state is None:
            return initial_state(self.config, self.mesh, start.params), 0, start.note
        step = jax.device_put(np.int32(0), target.step.sharding)
        return TrainState(step, start.params, start.opt_state), 0, start.note

    def _note_bad_batch(self, step: int, figures: Mapping[str, float], action: str) -> None:
        if jax.process_index() != 0:
            return
        try:
            write_bad_batch(self.workdir.bad_batches_file, step, self.data.records(step - 1), figures, action)
        except FileError as error:  # what becomes of the batch does not depend on it
            say(f"{error}; batch {step - 1}: {action}")

    def _report(self, loss: float) -> None:
        """Says the last validation loss a token and a byte, and compares it with the entropy of single bytes."""
        say(f"validation loss {loss:.4f} nats a token, on {describe_coverage(self.validation.fraction)}")
        bits = self.corpus.splits["validation"].bits_per_byte(loss, self.config.data.first_target_id)
        if bits is None:
            return
        entropy, nats = self.corpus.total.byte_entropy_nats, bits * math.log(2)
        say(f"validation loss {nats:.4f} nats a byte, {bits:.4f} bits a byte")
        if entropy > 0:  # 0 of a text of one byte only
            say(f"byte-unigram entropy of the corpus {entropy:.4f} nats: the loss is {nats / entropy:.1%} of it")


class _Loop:
    """The steps of a run, from the state that one start found to the end of that start."""

    def __init__(self, run: _Run, state: TrainState, start: int, progress: TrainMonitor, interrupts: Interrupts):
        self._run = run
        self._training = run.config.training
        self._state = state
        self._done = self._saved = start  # steps: started, and handed to the checkpoints
        self._progress = progress
        self._interrupts = interrupts
        self._validated = _validation_loss(run.workdir, start) is not None  # else a kill came between the two

    def run(self) -> TrainResult:
        """Steps, saves and validates as the config says, until the last step or a signal.

        Raises:
          RunStopped: whatever the reason, saying which step is saved; that of the last good state where it can be.
        """
        try:
            while (result := self._turn()) is None:
                pass
            self._run.checkpoints.wait()
            return result
        except (RatJaxError, OSError) as error:
            kind = type(error) if isinstance(error, RunStopped) else RunStopped
            raise kind(f"{_in_words(error)}; {self._rescue(error)}") from error

    def _turn(self) -> TrainResult | None:
        """What is due after the steps done, and one step more; returns the result where none is to follow."""
        done, training, progress = self._done, self._training, self._progress
        if done > self._saved and (done == training.num_steps or done % training.checkpoint_every_steps == 0):
            self._save()
        loss, is_due = None, done == training.num_steps or (done > 0 and done % training.validate_every_steps == 0)
        if is_due and not self._validated:
            loss = self._validate()
        if done == training.num_steps and loss is not None:
            return TrainResult(done, True, loss)
        if agreed(self._interrupts, done, training.log_every_steps):
            if done > self._saved:
                self._save()
            self._run.checkpoints.wait()
            say(f"interrupted after step {done}; the same command resumes there")
            return TrainResult(done, False, None)
        batch = global_batch(next(self._run.data), self._run.mesh)
        with progress.calling("training step"):
            self._state, metrics = train_step(
                self._run.graphdef,
                self._run.config.optimizer,
                training.num_steps,
                self._state,
                batch,
                self._run.guard.max_loss(done + 1),
            )
        self._interrupts.note()  # there is a step to save
        self._done, self._validated = done + 1, False
        progress.step(done + 1, metrics)
        return None

    def _save(self) -> None:
        self._progress.settle()  # nothing is saved after a step that was not finite
        data = self._run.data.state() | {"guard": self._run.guard.state()}
        with self._progress.pause():
            self._run.checkpoints.save(self._done, self._state.params, self._state.opt_state, data)
        self._saved = self._done

    def _validate(self) -> float | None:
        """Mean loss of the validation data; None if a signal came meanwhile."""
        self._progress.settle()
        sums = []
        with self._progress.pause(), contextlib.closing(iter(self._run.validation)) as batches:
            for batch in batches:
                if jax.process_count() == 1 and self._interrupts.requested:
                    return None
                with self._progress.calling("validation loss"):
                    batch = global_batch(batch, self._run.mesh)
                    sums.append(batch_loss(self._run.graphdef, self._state.params, batch))
            loss = sum(float(part.loss) for part in sums) / sum(float(part.weight) for part in sums)
        self._progress.validation(self._done, loss, self._run.validation.fraction)
        return loss

    def _rescue(self, error: Exception) -> str:
        """Saves what was done before an error, if that is good and not what failed; says what is saved."""
        failures = ""
        is_good = not isinstance(error, RunStopped | CheckpointError)  # of bad figures; of saving
        is_good &= self._run.data.state()["next_batch"] == self._done  # else the batch under way would be lost
        try:
            # Saving is done by all hosts together, and the others may not know of the error.
            if is_good and self._done > self._saved and jax.process_count() == 1:
                with contextlib.suppress(OSError):  # of the log, which does not make the state a bad one
                    self._progress.settle()
                self._save()
            self._run.checkpoints.wait()
        except (RatJaxError, OSError) as another:
            failures = f"{_in_words(another)}; "
        return f"{failures}{self._run.kept()}"


def _in_words(error: Exception) -> str:
    if isinstance(error, OSError) and not isinstance(error, RatJaxError):
        return f"{error.filename or 'the system'}: {explain(error)}"
    return str(error)


def _check_fits(newest: Manifest, config: Config, workdir: Workdir) -> None:
    if newest.data is None:
        if config.init.path is not None:
            raise CheckpointError(
                f"{workdir.path} holds a model to start from, and config.init.path names another: leave that out, or "
                f"choose another --workdir"
            )
        check_same_model(newest.config.model, config.model, workdir.path)
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
