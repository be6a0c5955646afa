"""Answers to the prompts of a file while training."""

import pathlib
from collections.abc import Callable, Mapping

import jax
from flax import nnx

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data.corpora import Corpora
from rat_jax.evaluation.answers import AnswerSettings, Questions, answer, find_metrics, score
from rat_jax.evaluation.subject import check_same_on_all_hosts
from rat_jax.training.evaluators.text_model import TextModel


class AnswersEvaluator:
    """How alike greedy answers and references are, in percent: `exact_match`, `token_f1` and `rouge_l`."""

    name = "answers"

    def __init__(self, config: Config, corpora: Corpora, mesh: jax.sharding.Mesh, workdir: Workdir):
        """Reads the prompts.

        Raises:
          EvaluationError, DataError: if there are none, a package is missing, or the model cannot be asked.
        """
        self._settings = settings = config.evaluation.answers
        self.every_steps = settings.every_steps
        self._model = TextModel(config, corpora, mesh)
        self._metrics = find_metrics()
        length = config.data.seq_len if settings.context_length is None else settings.context_length
        room = AnswerSettings(length, settings.max_new_tokens).room
        self._questions = Questions.read(
            pathlib.Path(settings.file), corpora.chat_template(), self._model.tokenizer, room, settings.limit
        )
        check_same_on_all_hosts({"SHA-256 of the prompts and answers": self._questions.hash})

    def run(self, params: nnx.State, step: int, check: Callable[[], None]) -> Mapping[str, float]:
        answers: dict[int, str] = {}

        def add(index: int, text: str) -> None:
            answers[index] = text
            check()

        with self._model.of(params) as model:
            answer(
                model,
                self._questions,
                self._model.tokenizer,
                self._settings.max_new_tokens,
                batch_tokens=self._settings.batch_tokens,
                on_answer=add,
            )
        examples = self._questions.examples
        texts = [answers[index] for index in range(len(examples))]
        return score(texts, [example.answers for example in examples], self._metrics)
