"""Tasks of the lm-evaluation-harness while training."""

import contextlib
import importlib.util
import pathlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data.corpora import Corpora
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.text_settings import TextSettings
from rat_jax.training.evaluators.evaluator import PartFailedError
from rat_jax.training.evaluators.text_model import TextModel


class TasksEvaluator:
    """Metrics of tasks with their standard errors: `TASK_METRIC`, `TASK_METRIC_stderr`.

    Of a task by itself all that the harness gives, of one in a group of ours the group's, and the mean as `GROUP`.
    """

    name = "tasks"

    def __init__(self, config: Config, corpora: Corpora, mesh: jax.sharding.Mesh, workdir: Workdir):
        """Loads the tasks with their data.

        Raises:
          EvaluationError, DataError: if one cannot be loaded, a package is missing, or the model cannot be asked.
        """
        self._settings = settings = config.evaluation.tasks
        self.every_steps = settings.every_steps
        self._seq_len = config.data.seq_len
        self._model = TextModel(config, corpora, mesh)
        if importlib.util.find_spec("lm_eval") is None:
            raise EvaluationError("it needs the lm-evaluation-harness: pip install -r requirements-eval.txt")
        from rat_jax.evaluation.harness_tasks import Tasks

        with _apart():
            self._tasks = Tasks(settings.names, None if settings.folder is None else pathlib.Path(settings.folder))
            for name in self._tasks.names:
                self._tasks.load(name)

    def run(self, params: nnx.State, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        from rat_jax.evaluation.harness import HarnessModel
        from rat_jax.evaluation.harness_tasks import run_tasks

        def checked(batches: Iterable[Any], num_batches: int) -> Iterator[Any]:
            for batch in batches:
                check()
                yield batch

        def model_of(name: str) -> HarnessModel:
            group = self._tasks.group_of(name)
            text = {"context_length": self._seq_len} | ({} if group is None else dict(group.text))
            return HarnessModel(
                model,
                self._model.tokenizer,
                self._model.mesh,
                TextSettings(**text),
                batch_tokens=self._settings.batch_tokens,
                progress=checked,
                on_text=lambda index, text: check(),
            )

        done: dict[str, dict[str, Any]] = {}
        with self._model.of(params) as model, _apart():
            run_tasks(
                self._tasks,
                model_of,
                num_fewshot=None,
                limit=self._settings.limit,
                on_result=done.__setitem__,
            )
        figures = self._figures(done)
        if failed := [values["error"] for values in done.values() if "error" in values]:
            raise PartFailedError("; ".join(failed), figures)
        return figures

    def _figures(self, done: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
        chosen = {task.name: task.metric for group in self._tasks.groups.values() for task in group.tasks}
        figures = {}
        for values in done.values():
            for task, metrics in values.get("results", {}).items():
                for key, value in metrics.items():
                    metric, _, kind = key.partition(",")
                    is_chosen = task not in chosen or metric.removesuffix("_stderr") == chosen[task]
                    if kind and is_chosen and isinstance(value, (int, float)):
                        figures[f"{task}_{metric}" if kind == "none" else f"{task}_{metric}_{kind}"] = float(value)
        for name, group in self._tasks.groups.items():
            if (mean := group.mean(done)) is not None:
                figures[name] = mean
        return figures


@contextlib.contextmanager
def _apart() -> Iterator[None]:
    """Keeps what the harness seeds, and what its tasks print, from the run."""
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # the harness seeds both
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
