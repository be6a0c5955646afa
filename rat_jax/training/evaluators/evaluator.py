"""What an evaluation while training is."""

from collections.abc import Callable, Mapping
from typing import Protocol

from flax import nnx

from rat_jax.evaluation.errors import EvaluationError


class PartFailedError(EvaluationError):
    """Some parts of an evaluation have no result; `figures` are those of the others."""

    def __init__(self, message: str, figures: Mapping[str, float]):
        super().__init__(message)
        self.figures = dict(figures)


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
          PartFailedError: if some parts have no result.
          RatJaxError, OSError: if there is none; what it says is one line of the run's messages.
        """
        ...
