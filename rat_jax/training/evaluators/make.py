"""The evaluators that a config asks for."""

import jax

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data.corpora import Corpora
from rat_jax.errors import RatJaxError
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.training.evaluators.answers import AnswersEvaluator
from rat_jax.training.evaluators.evaluator import Evaluator
from rat_jax.training.evaluators.length import LengthEvaluator
from rat_jax.training.evaluators.ruler import RulerEvaluator
from rat_jax.training.evaluators.tasks import TasksEvaluator


def make_evaluators(config: Config, corpora: Corpora, mesh: jax.sharding.Mesh, workdir: Workdir) -> list[Evaluator]:
    """Those whose `every_steps` is given.

    Raises:
      EvaluationError: naming the group that can have no result, and why.
    """
    groups = config.evaluation
    kinds = [
        (groups.length, LengthEvaluator),
        (groups.ruler, RulerEvaluator),
        (groups.answers, AnswersEvaluator),
        (groups.tasks, TasksEvaluator),
    ]
    evaluators = []
    for group, make in kinds:
        if group.every_steps is None:
            continue
        try:
            evaluators.append(make(config, corpora, mesh, workdir))
        except RatJaxError as error:
            raise EvaluationError(f"config.evaluation.{make.name}: {error}") from error
    return evaluators
