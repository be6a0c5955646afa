"""A training run: from a config and a workdir to the last checkpoint; it resumes where an earlier start ended."""

import contextlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from rat_jax.checkpoints.hosts import difference_from_first, on_first_host
from rat_jax.checkpoints.owner import Owner, owned
from rat_jax.checkpoints.run_log import Record, read_log
from rat_jax.checkpoints.store import Checkpoints, Manifest
from rat_jax.checkpoints.workdir import (
    CheckpointError,
    Workdir,
    check_same_model,
    check_same_run,
)
from rat_jax.config import Config, with_absolute_paths
from rat_jax.data import DataError
from rat_jax.data.corpora import Corpora
from rat_jax.data.integrity import WHOLE_BYTES
from rat_jax.data.pipeline import TrainData, check_fingerprint
from rat_jax.data.workers import check_main
from rat_jax.data_config import DataConfig
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.files import FileError, in_words
from rat_jax.interrupts import Interrupts, caught
from rat_jax.memory import is_out_of_memory
from rat_jax.mesh import mesh_of_rows
from rat_jax.paths import local_path
from rat_jax.sharding import check_divides, describe_axes, make_mesh, share_of_rows
from rat_jax.training.evaluations import Evaluations, names_in_log
from rat_jax.training.evaluators import Evaluator, make_evaluators
from rat_jax.training.guards import Guard, write_bad_batch
from rat_jax.training.loop import TrainLoop, TrainResult, kept
from rat_jax.training.mesh_advice import mesh_advice
from rat_jax.training.metrics import MetricLog, check_wandb
from rat_jax.training.monitor import TrainMonitor, say
from rat_jax.training.oom import explain_out_of_memory
from rat_jax.training.origin import Origin, open_origin
from rat_jax.training.profile import StepProfile
from rat_jax.training.step import TrainState, abstract_state, initial_state
from rat_jax.training.validation import Validation


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
    on_first_host(workdir.is_new)  # what is no run's is left before anything is written there
    with owned(workdir.path) as owner:
        return _train(config, workdir, owner, interrupts)


def _train(config: Config, workdir: Workdir, owner: Owner | None, interrupts: Interrupts) -> TrainResult:
    checkpoints = Checkpoints(workdir, config, say, owner)
    newest = checkpoints.peek()
    if newest is not None:
        _check_fits(newest, config, workdir)
    corpora = Corpora.open(config.data)
    if newest is not None:
        corpora.check_tokenizer(workdir.tokenizer)

    mesh = make_mesh(config.mesh)
    check_divides(config, mesh)
    origin = open_origin(config, say) if newest is None else None
    if origin is not None and origin.tokenizer is not None:
        corpora.check_tokenizer(origin.tokenizer)
    place, count = share_of_rows(mesh)
    hosts = {"process_index": place, "process_count": count}
    data = TrainData(config.data, vocab_size=config.model.vocab_size, seed=config.seed, **hosts)
    validation = Validation(config, **hosts)
    if (difference := difference_from_first(data.fingerprint)) is not None:
        raise DataError(f"the hosts have different data: {difference}")
    evaluators = make_evaluators(config, corpora, mesh_of_rows(mesh), workdir)
    if newest is not None and newest.data is not None:
        check_fingerprint(newest.data["fingerprint"], data.fingerprint)
    try:
        corpora.verify(max_bytes=WHOLE_BYTES, say=say)
        with jax.set_mesh(mesh):
            run = _Run(config, workdir, owner, checkpoints, corpora, mesh, data, validation, evaluators, origin)
            return run.finish(interrupts)
    finally:
        data.close()


class _Run:
    """A run whose settings were found to fit."""

    def __init__(self, config, workdir, owner, checkpoints, corpora, mesh, data, validation, evaluators, origin):
        self.config: Config = config
        self.workdir: Workdir = workdir
        self.owner: Owner | None = owner  # None on hosts other than the first
        self.checkpoints: Checkpoints = checkpoints
        self.corpora: Corpora = corpora
        self.mesh: jax.sharding.Mesh = mesh
        self.data: TrainData = data
        self.validation: Validation = validation
        self.evaluators: Sequence[Evaluator] = evaluators
        self.origin: Origin | None = origin
        self.guard = Guard(config.training, self._note_bad_batch)

    def finish(self, interrupts: Interrupts) -> TrainResult:
        """Does the steps that remain; where memory is lacking, says what to change.

        Raises:
          RunStopped: where memory is lacking, too.
          JaxRuntimeError: of a device that fails otherwise. Its trace is of use, and ends with what is saved.
        """
        try:
            return self._finish(interrupts)
        except jax.errors.JaxRuntimeError as error:
            if not is_out_of_memory(error):
                error.add_note(kept(self.checkpoints))
                raise
            say(explain_out_of_memory(self.config, self.mesh))
            raise RunStopped(f"a device has too little memory, see above; {kept(self.checkpoints)}") from error

    def _finish(self, interrupts: Interrupts) -> TrainResult:
        state, start, note = self._restore()
        num_steps = self.config.training.num_steps
        records = _records(self.workdir, start)
        loss = _validation_loss(records)
        evaluations = Evaluations(self.config, self.evaluators, mesh_of_rows(self.mesh), start, names_in_log(records))
        if start >= num_steps and loss is not None and not evaluations.due(start):
            say(f"{self.workdir.path}: the run is finished, all {num_steps} steps are done")
            self._report(loss)
            return TrainResult(num_steps, True, loss)
        on_first_host(lambda: self._mark(note))
        num_parameters = sum(x.size for x in jax.tree.leaves(state.params))
        say(_summary(self.config, self.mesh, num_parameters, start))
        if advice := mesh_advice(self.mesh):
            say(f"advice      {advice}")
        try:
            with contextlib.ExitStack() as stack:  # closes each, from the last to the first, also if another fails
                stack.callback(self.checkpoints.close)
                log = self._open_log(start, stack)
                progress = TrainMonitor(self.config, self.guard, log, start, num_parameters)
                stack.callback(progress.close)
                profile = StepProfile(self.config.training, self.workdir.profile, start, say)
                stack.callback(profile.close)
                loop = TrainLoop(
                    config=self.config,
                    mesh=self.mesh,
                    data=self.data,
                    validation=self.validation,
                    evaluations=evaluations,
                    checkpoints=self.checkpoints,
                    guard=self.guard,
                    progress=progress,
                    profile=profile,
                    interrupts=interrupts,
                    state=state,
                    start=start,
                    validation_loss=loss,
                )
                result = loop.run()
                say(f"time went to {progress.times.summary()}")
        except RunStopped:
            raise
        except (RatJaxError, OSError) as error:
            raise RunStopped(f"{in_words(error)}; {kept(self.checkpoints)}") from error
        if result.finished:
            self._report(result.validation_loss)
        return result

    def _mark(self, note: dict[str, Any] | None) -> None:
        """The first thing that is written. An error leaves all as it was."""
        self.owner.check()
        self.workdir.mark(self.config, self.checkpoints.saved_step, note)

    def _open_log(self, start: int, stack: contextlib.ExitStack) -> MetricLog | None:
        """Writes what else belongs into a workdir, and opens the log on the first host, to be closed by `stack`."""
        logs = []

        def open_log() -> None:
            self.workdir.save_tokenizer(self.corpora.tokenizer(), self.corpora.chat_template())
            logs.append(MetricLog(self.workdir, self.config, start, say, self.owner))
            stack.callback(logs[0].close)

        on_first_host(open_log)
        return logs[0] if logs else None

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
            say(f"resuming from {path}")
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
        self.owner.check()
        try:
            write_bad_batch(self.workdir.bad_batches_file, step, self.data.records(step - 1), figures, action)
        except FileError as error:  # what becomes of the batch does not depend on it
            say(f"{error}; batch {step - 1}: {action}")

    def _report(self, loss: float) -> None:
        """Says the last validation loss a token and a byte, and compares it with the entropy of single bytes."""
        say(f"validation loss {loss:.4f} nats a token, on {self.validation.describe()}")
        if len(self.corpora.by_name) > 1:
            return
        corpus = self.corpora.first
        bits = corpus.splits["validation"].bits_per_byte(loss, self.config.data.first_target_id)
        if bits is None:
            return
        entropy, nats = corpus.total.byte_entropy_nats, bits * math.log(2)
        say(f"validation loss {nats:.4f} nats a byte, {bits:.4f} bits a byte")
        if entropy > 0:  # 0 of a text of one byte only
            say(f"byte-unigram entropy of the corpus {entropy:.4f} nats: the loss is {nats / entropy:.1%} of it")


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


def _records(workdir: Workdir, step: int) -> list[Record]:
    """What the log says of a step. All hosts must call this together."""
    return on_first_host(lambda: [record for record in read_log(workdir.log_file) if record["step"] == step])


def _validation_loss(records: Sequence[Record]) -> float | None:
    """The last one. Losses without `validation_fraction` are of other tokens, to be measured again."""
    losses = [
        record["validation_loss"]
        for record in records
        if "validation_fraction" in record and "validation_loss" in record
    ]
    return losses[-1] if losses else None


def _summary(config: Config, mesh: jax.sharding.Mesh, num_parameters: int, start: int) -> str:
    device = mesh.devices.flat[0]
    model, data = config.model, config.data
    return "\n".join(
        [
            f"devices     {mesh.size} x {device.device_kind}, {describe_axes(mesh)}",
            f"parameters  {num_parameters:,}",
            f"model       {model.num_layers} layers of {', '.join(model.pattern)}; width {model.width}, "
            f"{model.num_heads} heads, vocabulary {model.vocab_size}, {model.dtype}",
            f"data        {_data_words(data)}: {data.global_batch_size} sequences of {data.seq_len} tokens a step",
            f"steps       {start} of {config.training.num_steps} done",
        ]
    )


def _data_words(data: DataConfig) -> str:
    """The corpora, of several each with its share."""
    total = math.fsum(data.weights.values())
    return ", ".join(
        f"{name} {data.weights[name] / total:.1%} {path}" if name else path for name, path in data.paths.items()
    )
