"""The loop of a training run: steps, saves and measurements, from the state that a start found to that start's end."""

import contextlib
import dataclasses
from time import monotonic

import jax

from rat_jax import cluster
from rat_jax.checkpoints.store import Checkpoints, abstract_model
from rat_jax.checkpoints.workdir import CheckpointError
from rat_jax.config import Config
from rat_jax.data.pipeline import TrainData, ValidationData
from rat_jax.errors import RatJaxError, RunStopped
from rat_jax.files import in_words
from rat_jax.interrupts import Interrupts
from rat_jax.sharding import global_batch
from rat_jax.training.evaluations import Evaluations
from rat_jax.training.guards import Guard
from rat_jax.training.monitor import TrainMonitor, say
from rat_jax.training.preemption import agreed
from rat_jax.training.profile import StepProfile
from rat_jax.training.step import TrainState, batch_loss, train_step
from rat_jax.training.validation import Validation


@dataclasses.dataclass(frozen=True)
class TrainResult:
    """How far a run has come."""

    step: int  # optimizer steps done
    finished: bool  # False: a signal ended it before the last step; the same command resumes
    validation_loss: float | None  # after the last step, on `training.validation_batches`; None if not finished


@dataclasses.dataclass(kw_only=True)
class TrainLoop:
    """Takes batches in order, does a step with each, and saves, validates and evaluates when the config says so.

    What is due after a step is done before the next one begins: first the save, then the validation, then the
    evaluations. A start that resumes where a kill came in between does first what is left of it.
    """

    config: Config
    mesh: jax.sharding.Mesh
    data: TrainData  # at batch `start`
    validation: Validation
    evaluations: Evaluations
    checkpoints: Checkpoints
    guard: Guard
    progress: TrainMonitor
    profile: StepProfile
    interrupts: Interrupts
    state: TrainState  # after `start` steps; its arrays are donated
    start: int  # steps done
    validation_loss: float | None  # after `start` steps; None: not known

    def __post_init__(self):
        self._training = self.config.training
        self._graphdef = abstract_model(self.config.model)[0]
        self._done = self._saved = self.start  # steps: started, and handed to the checkpoints
        self._saved_secs = monotonic()

    def run(self) -> TrainResult:
        """Steps, saves and validates as the config says, until the last step or a signal.

        Raises:
          RunStopped: whatever the reason, saying which step is saved; that of the last good state where it can be.
          JaxRuntimeError: of a device. The state may be lost or wrong and is not saved; what was being saved is waited
            for.
        """
        try:
            while (result := self._turn()) is None:
                pass
            self.checkpoints.wait()
            return result
        except (RatJaxError, OSError) as error:
            kind = type(error) if isinstance(error, RunStopped) else RunStopped
            raise kind(f"{in_words(error)}; {self._rescue(error)}") from error
        except jax.errors.JaxRuntimeError:
            with contextlib.suppress(RatJaxError, OSError, jax.errors.JaxRuntimeError):  # the first one is reported
                self.checkpoints.wait()
            raise

    def _turn(self) -> TrainResult | None:
        """What is due after the steps done, and one step more; returns the result where none is to follow."""
        done, training, progress = self._done, self._training, self.progress
        cluster.reached(done)
        if done > self._saved and self._is_save_due():
            self._save()
        is_due = done == training.num_steps or (done > 0 and done % training.validate_every_steps == 0)
        if is_due and self.validation_loss is None:
            self.validation_loss = self._validate()
        if self.evaluations.due(done):
            progress.settle()
            self.evaluations.run(self.state.params, done, progress, self.interrupts)
        if done == training.num_steps and self.validation_loss is not None and not self.evaluations.due(done):
            return TrainResult(done, True, self.validation_loss)
        if agreed(self.interrupts.requested, done, training.log_every_steps):
            if done > self._saved:
                self._save()
            self.checkpoints.wait()
            say(f"interrupted after step {done}; the same command resumes there")
            return TrainResult(done, False, None)
        with progress.times.spent_on("data"):
            batch = global_batch(next(self.data), self.mesh)
        self.profile.before(done + 1)
        with progress.calling("training step"):
            self.state, metrics = train_step(
                self._graphdef,
                self.config.optimizer,
                training.num_steps,
                self.state,
                batch,
                self.guard.max_loss(done + 1),
            )
        self.interrupts.note()  # there is a step to save
        self._done, self.validation_loss = done + 1, None
        progress.step(done + 1, metrics)
        self.profile.after(done + 1, progress.settle)
        return None

    def _is_save_due(self) -> bool:
        """After the steps done; by the time of any host."""
        done, minutes = self._done, self._training.checkpoint_every_minutes
        if done == self._training.num_steps or done % self._training.checkpoint_every_steps == 0:
            return True
        if minutes is None:
            return False
        is_late = monotonic() - self._saved_secs >= 60 * minutes
        return agreed(is_late, done, self._training.log_every_steps)

    def _save(self) -> None:
        self.progress.settle()  # nothing is saved after a step that was not finite
        data = self.data.state() | {"guard": self.guard.state()}
        with self.progress.pause("saving"):
            self.checkpoints.save(self._done, self.state.params, self.state.opt_state, data)
        self._saved, self._saved_secs = self._done, monotonic()

    def _validate(self) -> float | None:
        """Mean loss of the validation data; None if a signal came meanwhile."""
        self.progress.settle()
        losses = {}
        with self.progress.pause("validating"):
            for name, split in self.validation.splits.items():
                losses[name] = self._mean_loss(split)
                if losses[name] is None:
                    return None
        result = self.validation.result(losses)
        self.progress.validation(self._done, result, self.validation.describe())
        return result.loss

    def _mean_loss(self, split: ValidationData) -> float | None:
        """Of one split; None if a signal came meanwhile."""
        sums = []
        with contextlib.closing(iter(split)) as batches:
            for batch in batches:
                if jax.process_count() == 1 and self.interrupts.requested:
                    return None
                with self.progress.calling("validation loss"):
                    batch = global_batch(batch, self.mesh)
                    sums.append(batch_loss(self._graphdef, self.state.params, batch))
            return sum(float(part.loss) for part in sums) / sum(float(part.weight) for part in sums)

    def _rescue(self, error: Exception) -> str:
        """Saves what was done before an error, if that is good and not what failed; says what is saved."""
        failures = ""
        is_good = not isinstance(error, RunStopped | CheckpointError)  # of bad figures; of saving
        is_good &= self.data.state()["next_batch"] == self._done  # else the batch under way would be lost
        try:
            # Saving is done by all hosts together, and the others may not know of the error.
            if is_good and self._done > self._saved and jax.process_count() == 1:
                with contextlib.suppress(OSError):  # of the log, which does not make the state a bad one
                    self.progress.settle()
                self._save()
            self.checkpoints.wait()
        except (RatJaxError, OSError) as another:
            failures = f"{in_words(another)}; "
        return f"{failures}{kept(self.checkpoints)}"


def kept(checkpoints: Checkpoints) -> str:
    """What a run that ends too early leaves."""
    step = checkpoints.saved_step
    if not step:
        return "no step was saved yet"
    return f"step {step} is saved, and the same command resumes there"
