"""Evaluations while training: when each is due, and what becomes of its figures.

An evaluation reads parameters and returns figures. It has no part in a run's randomness, in the order of its data or in
the time of its steps. The kinds are in `rat_jax.training.evaluators`.
"""

import time
from collections.abc import Collection, Sequence

import jax
from flax import nnx
from jax.sharding import Mesh

from rat_jax.checkpoints.run_log import Record
from rat_jax.config import Config
from rat_jax.errors import RatJaxError
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.files import in_words
from rat_jax.interrupts import Interrupts
from rat_jax.training.evaluators import Evaluator, PartFailedError
from rat_jax.training.monitor import TrainMonitor

_FAILED, _SECS = "failed", "secs"  # figures of every evaluation: 1 if it had no result, else how long it took


class Evaluations:
    """The evaluations of a run, each after every `every_steps` steps of its own and after the last one."""

    def __init__(self, config: Config, evaluators: Sequence[Evaluator], mesh: Mesh, start: int, done: Collection[str]):
        """Computes nothing.

        Args:
          config: of the run.
          evaluators: of the run, from `make_evaluators`.
          mesh: that they were made for.
          start: steps done.
          done: names of those that were done after `start` steps, by `names_in_log`.
        """
        self._num_steps, self._on_failure = config.training.num_steps, config.evaluation.on_failure
        self._evaluators, self._mesh = evaluators, mesh
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
          EvaluationError: if one has no result and the config says that this ends the run, or there are several hosts.
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
                with monitor.pause("evaluating"), jax.set_mesh(self._mesh):
                    figures = dict(evaluator.run(params, step, check))
            except _SignalError:
                return
            except (RatJaxError, OSError) as error:
                reason = " ".join(in_words(error).split())
                figures = error.figures if isinstance(error, PartFailedError) else {}
                lack = "lacks results" if figures else "has no result"
                message = f"step {step}: the {evaluator.name} evaluation {lack}: {reason}"
                # Of several hosts the others may have no error, and would wait for this one without end.
                if self._on_failure == "stop" or jax.process_count() > 1:
                    raise EvaluationError(message) from error
                figures = {f"{evaluator.name}/{name}": value for name, value in {**figures, _FAILED: 1.0}.items()}
                monitor.evaluation(step, f"{message}. The run goes on", figures)
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
