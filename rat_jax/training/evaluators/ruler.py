"""RULER while training."""

from collections.abc import Callable, Mapping

import jax
from flax import nnx

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data.corpora import Corpora
from rat_jax.evaluation.ruler import check_ruler, run_ruler
from rat_jax.training.evaluators.evaluator import PartFailedError
from rat_jax.training.evaluators.text_model import TextModel


class RulerEvaluator:
    """Percent of the answers that stand in what the model says: `TASK_LENGTH`."""

    name = "ruler"

    def __init__(self, config: Config, corpora: Corpora, mesh: jax.sharding.Mesh, workdir: Workdir):
        """Makes an example of each task and length.

        Raises:
          EvaluationError, DataError: if there is none, or the model cannot be asked.
        """
        settings = config.evaluation.ruler
        self.every_steps = settings.every_steps
        self._model = TextModel(config, corpora, mesh)
        self._examples = {
            "tasks": settings.tasks,
            "context_lengths": settings.context_lengths,
            "templates": settings.templates,
            "essay": settings.essay,
            "seed": settings.seed,
            "answer_tokens": settings.answer_tokens,
        }
        self._amounts = {"num_examples": settings.num_examples, "batch_tokens": settings.batch_tokens}
        check_ruler(self._model.tokenizer, **self._examples)

    def run(self, params: nnx.State, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        with self._model.of(params) as model:
            found = run_ruler(model, self._model.tokenizer, **self._examples, **self._amounts, on_answer=check)
        figures = {f"{one.task}_{one.context_length}": one.mean("string_match_all") for one in found.measurements}
        if found.failures:
            reasons = (f"{one.task} at {one.context_length}: {one.message}" for one in found.failures)
            raise PartFailedError("; ".join(reasons), figures)
        return figures
