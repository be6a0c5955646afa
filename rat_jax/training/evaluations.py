"""What is measured while training besides the validation loss: when, on which parameters, and what becomes of it.

An evaluation reads parameters and returns figures. It has no part in a run's randomness, in the order of its data or in
the time of its steps. A new kind is a group of `rat_jax.config.EvaluationConfig`, a class that keeps `Evaluator`, and a
line of `make_evaluators`.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import jax
from flax import nnx

from rat_jax.checkpoints.run_log import Record
from rat_jax.checkpoints.store import LoadedModel, abstract_model
from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data.corpus import Corpus
from rat_jax.errors import RatJaxError
from rat_jax.evaluation.length_generalization import measure
from rat_jax.evaluation.perplexity import EvaluationError, check_length
from rat_jax.files import in_words
from rat_jax.interrupts import Interrupts
from rat_jax.training.monitor import TrainMonitor

_FAILED, _SECS = "failed", "secs"  # figures of every evaluation: 1 if it had no result, else how long it took


class Evaluator(Protocol):
    """One kind of evaluation, made before a run begins; what cannot be measured at all is refused then."""

    name: str  # of its group in `EvaluationConfig`, and in front of its figures in the log
    every_steps: int

    def run(self, params: nnx.State, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        """Figures of the parameters after `step` steps. All hosts call it together.

        Args:
          params: on the mesh, which is in use; they are donated to the next step.
          step: steps done.
          check: is to be called now and then; it raises where the run is to end.

        Raises:
          RatJaxError, OSError: if there is no result; what it says is one line of the run's messages.
        """
        ...


class LengthEvaluator:
    """The loss of the validation split in sequences of other lengths: `loss_N`, of longer ones also `loss_N_beyond`."""

    name = "length"

    def __init__(self, config: Config, corpus: Corpus, mesh: jax.sharding.Mesh, workdir: Workdir):
        """Checks the lengths.

        Raises:
          EvaluationError: if the split has no sequence of one of them.
        """
        self._config, self._corpus, self._mesh, self._workdir = config, corpus, mesh, workdir
        self._settings = config.evaluation.length
        self._graphdef = abstract_model(config.model)[0]
        self.every_steps = self._settings.every_steps
        for length in self._settings.lengths:
            check_length(corpus, length)

    def run(self, params: nnx.State, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        def checked(batches, num_batches):
            for batch in batches:
                check()
                yield batch

        loaded = LoadedModel(self._config, nnx.merge(self._graphdef, params), step, self._workdir.path)
        figures = {}
        for length in self._settings.lengths:
            found = measure(
                loaded,
                self._corpus,
                self._mesh,
                length,
                batch_tokens=self._settings.batch_tokens,
                max_batches=self._settings.max_batches,
                progress=checked,
            )
            figures[f"loss_{length}"] = found.loss
            if found.loss_beyond is not None:
                figures[f"loss_{length}_beyond"] = found.loss_beyond
        return figures


def make_evaluators(config: Config, corpus: Corpus, mesh: jax.sharding.Mesh, workdir: Workdir) -> list[Evaluator]:
    """Those that a config asks for.

    Raises:
      EvaluationError: if one can have no result.
    """
    kinds = [(config.evaluation.length, LengthEvaluator)]
    return [make(config, corpus, mesh, workdir) for group, make in kinds if group.every_steps is not None]


class Evaluations:
    """The evaluations of a run, each after every `every_steps` steps of its own and after the last one."""

    def __init__(self, config: Config, evaluators: Sequence[Evaluator], start: int, done: Collection[str]):
        """Computes nothing.

        Args:
          config: of the run.
          evaluators: of the run, from `make_evaluators`.
          start: steps done.
          done: names of those that were done after `start` steps, by `names_in_log`.
        """
        self._num_steps, self._on_failure = config.training.num_steps, config.evaluation.on_failure
        self._evaluators = evaluators
        self._step, self._done = start, set(done)

    def due(self, step: int) -> list[Evaluator]:
        """Those that are to be done after `step` steps, and were not."""
        done = self._done if step == self._step else ()
        return [
            evaluator
            for evaluator in self._evaluators
            if step > 0
            and (step == self._num_steps or step % evaluator.every_steps == 0)
            and evaluator.name not in done
        ]

    def run(self, params: nnx.State, step: int, monitor: TrainMonitor, interrupts: Interrupts) -> None:
        """Does what is due after `step` steps; a signal ends it, and what it had not done is still due.

        Raises:
          EvaluationError: if one has no result and the config says that this ends the run.
          FileError: if the log cannot be written.
        """

        def check() -> None:
            if jax.process_count() == 1 and interrupts.requested:  # other hosts would not stop with this one
                raise _SignalError

        for evaluator in self.due(step):
            if step != self._step:
                self._step, self._done = step, set()
            start = time.perf_counter()
            try:
                check()
                with monitor.pause():
                    figures = dict(evaluator.run(params, step, check))
            except _SignalError:
                return
            except (RatJaxError, OSError) as error:
                reason = " ".join(in_words(error).split())
                message = f"step {step}: the {evaluator.name} evaluation has no result: {reason}"
                if self._on_failure == "stop":
                    raise EvaluationError(message) from error
                monitor.evaluation(step, f"{message}. The run goes on", {f"{evaluator.name}/{_FAILED}": 1.0})
            else:
                words = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
                figures[_SECS] = time.perf_counter() - start
                figures = {f"{evaluator.name}/{name}": value for name, value in figures.items()}
                monitor.evaluation(step, f"step {step}: {evaluator.name} evaluation: {words}", figures)
            self._done.add(evaluator.name)


class _SignalError(Exception):
    """A signal came while evaluating."""


def names_in_log(records: Sequence[Record]) -> set[str]:
    """The names of evaluations that were done, from a log's records of one step."""
    ends = (f"/{_FAILED}", f"/{_SECS}")
    return {figure.rpartition("/")[0] for record in records for figure in record if figure.endswith(ends)}
