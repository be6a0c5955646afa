"""Answers to RULER's tasks, scored: what is right by task, context length and depth."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from rat_jax.checkpoints.hosts import on_all_hosts
from rat_jax.data.tokenizer import Tokenizer
from rat_jax.errors import RatJaxError
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.ruler.examples import Example, Settings, check_task, make_example
from rat_jax.evaluation.ruler.scoring import METRICS, found, scores

NUM_DEPTHS = 11  # of a heat map: 0, 10 % .. 100 %
_LEAST_GROUP = 64  # examples that are in memory at a time, or a batch of them where that is more


@dataclasses.dataclass(frozen=True)
class DepthCount:
    """Answers whose needles stand at about one depth."""

    depth: float
    num_answers: int
    num_found: int


@dataclasses.dataclass(frozen=True)
class Answered:
    """What was asked and said; the prompt, which may be long, follows from the example's number."""

    index: int
    answers: tuple[str, ...]
    depths: tuple[float, ...]
    prompt_tokens: int
    answer_tokens: int
    prediction: str

    @classmethod
    def of(cls, example: Example, prediction: str) -> "Answered":
        return cls(
            index=example.index,
            answers=example.answers,
            depths=example.depths,
            prompt_tokens=example.prompt_tokens,
            answer_tokens=example.answer_tokens,
            prediction=prediction,
        )


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One task at one context length."""

    task: str
    context_length: int
    answered: Sequence[Answered]

    @property
    def predictions(self) -> list[str]:
        """The text after each prompt."""
        return [one.prediction for one in self.answered]

    def mean(self, metric: str) -> float:
        """The mean of a metric over the examples, in percent."""
        return 100 * sum(self._scores(metric)) / len(self.answered)

    def standard_error(self, metric: str) -> float | None:
        """Of the mean, in percent; None for a single example."""
        values = self._scores(metric)
        if len(values) < 2:
            return None
        mean = sum(values) / len(values)
        return 100 * math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))

    def by_depth(self) -> list[DepthCount]:
        """Answers found, by the depth of their needles; empty for tasks without needles."""
        hits: dict[int, list[bool]] = {}
        for one in self.answered:
            for depth, hit in zip(one.depths, found(one.prediction, one.answers), strict=bool(one.depths)):
                hits.setdefault(round(depth * (NUM_DEPTHS - 1)), []).append(hit)
        return [DepthCount(bin_ / (NUM_DEPTHS - 1), len(hits[bin_]), sum(hits[bin_])) for bin_ in sorted(hits)]

    def as_json(self) -> dict[str, Any]:
        """All figures, and each prediction beside its answers, as values that JSON can hold."""
        tokens = [one.prompt_tokens for one in self.answered]
        return {
            "task": self.task,
            "context_length": self.context_length,
            "num_examples": len(self.answered),
            "prompt_tokens": [min(tokens), max(tokens)],
            "answer_tokens": max(one.answer_tokens for one in self.answered),
            "scores": {metric: self.mean(metric) for metric in METRICS},
            "standard_errors": {metric: self.standard_error(metric) for metric in METRICS},
            "by_depth": [dataclasses.asdict(count) for count in self.by_depth()],
            "predictions": [
                {
                    "index": one.index,
                    "depths": [round(depth, 4) for depth in one.depths],
                    "answers": list(one.answers),
                    "prediction": one.prediction,
                }
                for one in self.answered
            ],
        }

    def _scores(self, metric: str) -> list[float]:
        return [scores(one.prediction, one.answers)[metric] for one in self.answered]


@dataclasses.dataclass(frozen=True)
class Failure:
    """A task at a context length that has no result."""

    task: str
    context_length: int
    message: str

    def as_json(self) -> dict[str, Any]:
        return {"task": self.task, "context_length": self.context_length, "error": self.message}


Result = Measurement | Failure


def measure(
    answer: Callable[[Sequence[Example], int], list[str]],
    tokenizer: Tokenizer,
    tasks: Sequence[str],
    settings: Iterable[Settings],
    *,
    num_examples: int,
    batch_tokens: int,
    on_result: Callable[[Result], None],
) -> list[Result]:
    """Every task at the context length of each of the settings; one that fails does not stop the others.

    On several hosts this holds of tasks whose examples cannot be made. One that fails as it is answered, which it may
    do on this host alone while others wait for it, stops all.

    Args:
      answer: the texts after the prompts of examples, so many of them at a time.
      tokenizer: prompts are filled by its tokens.
      tasks: names.
      settings: of the examples, one for each context length.
      num_examples: of each task and length, numbered from 0.
      batch_tokens: of contexts that are answered at a time; one at least.
      on_result: called with each result as soon as it is there.

    Raises:
      EvaluationError: if a task is unknown or the number of examples is below 1.
      RatJaxError: on several hosts, of a task that fails as it is answered.
    """
    if num_examples < 1:
        raise EvaluationError(f"the number of examples must be 1 or more, got {num_examples}")
    for task in tasks:
        check_task(task)
    results: list[Result] = []
    for part in settings:
        batch_size = max(1, batch_tokens // part.context_length)
        group_size = batch_size * -(-_LEAST_GROUP // batch_size)
        for task in tasks:
            answered: list[Answered] = []
            is_answering = False
            try:
                for start in range(0, num_examples, group_size):
                    numbers = range(start, min(start + group_size, num_examples))
                    is_answering = False
                    examples = on_all_hosts(functools.partial(_make_examples, task, numbers, tokenizer, part))
                    is_answering = True
                    answered += map(Answered.of, examples, answer(examples, batch_size))
                results.append(Measurement(task, part.context_length, answered))
            except RatJaxError as error:
                if is_answering and jax.process_count() > 1:
                    raise
                results.append(Failure(task, part.context_length, str(error)))
            on_result(results[-1])
    return results


def _make_examples(task: str, numbers: Iterable[int], tokenizer: Tokenizer, settings: Settings) -> list[Example]:
    return [make_example(task, index, tokenizer, settings) for index in numbers]
