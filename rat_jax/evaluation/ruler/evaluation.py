"""A model on RULER's tasks."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.ruler.examples import TASKS, Example, Settings, check_task, make_example, prompt_ids
from rat_jax.evaluation.ruler.harness_templates import harness_templates
from rat_jax.evaluation.ruler.haystacks import Essay
from rat_jax.evaluation.ruler.items import Split
from rat_jax.evaluation.ruler.measurement import NUM_DEPTHS, Failure, Measurement, Result, measure
from rat_jax.evaluation.ruler.templates import OWN, Templates
from rat_jax.evaluation.ruler.words import find_words
from rat_jax.evaluation.subject import check_same_on_all_hosts
from rat_jax.model import LanguageModel
from rat_jax.sampling import generate_text

GROUP = "ruler"  # the name of all tasks together
NUM_EXAMPLES = 500  # RULER's, of each task and length


@dataclasses.dataclass(frozen=True)
class RulerResults:
    """What was measured, and what it depends on."""

    measured: dict[str, Any]  # settings, as values that JSON can hold
    results: Sequence[Result]

    @property
    def measurements(self) -> list[Measurement]:
        """The results of tasks that did not fail."""
        return [result for result in self.results if isinstance(result, Measurement)]

    @property
    def failures(self) -> list[Failure]:
        """Those of tasks that did."""
        return [result for result in self.results if isinstance(result, Failure)]

    def as_json(self) -> dict[str, Any]:
        """All of it, as values that JSON can hold."""
        return {"measured": self.measured, "results": [result.as_json() for result in self.results]}


def run_ruler(
    model: LanguageModel,
    tokenizer: Tokenizer,
    *,
    tasks: Sequence[str],
    context_lengths: Sequence[int],
    batch_tokens: int,
    num_examples: int = NUM_EXAMPLES,
    templates: str = "harness",
    essay: str | None = None,
    words: str | None = None,
    split: Split = "validation",
    seed: int = 0,
    answer_tokens: int | None = None,
    bos: bool = False,
    on_result: Callable[[RulerResults], None] = lambda results: None,
    on_answer: Callable[[], None] = lambda: None,
) -> RulerResults:
    """Greedy answers to generated examples, scored.

    Prompts of similar length are continued together, and what pads shorter ones is not read: an answer follows from
    its own prompt alone. The needles asked for first go evenly through 11 depths.

    Args:
      model: what answers.
      tokenizer: the model's.
      tasks: names of `TASKS`, or `ruler` for all of them.
      context_lengths: tokens of the prompt and the room for its answer.
      batch_tokens: of the contexts that are read and continued at a time; one at least.
      num_examples: of each task and length.
      templates: `harness`, RULER's own sentences, or `own`, short ones whose figures are not RULER's.
      essay: the text that some tasks hide needles in, as a `--source` of `rat_jax.data.prepare`. None: they fail.
      words: `wonderwords`, which RULER draws from, or `generated`. None: see `find_words`.
      split: whose keys, values and sentences are used.
      seed: of the examples.
      answer_tokens: room for the answer, of which so many tokens are generated at most. None: RULER's of each task.
      bos: whether the id that ends documents comes before each prompt, in the place of a BOS.
      on_result: called after each task with the results so far.
      on_answer: called after each answer.

    Raises:
      EvaluationError: if a setting is unknown or out of range, or the templates or words are not there.
      DataError: if the essay cannot be read.
    """
    tasks = task_names(tasks)
    settings = find_settings(
        context_lengths,
        templates=templates,
        essay=essay,
        words=words,
        split=split,
        seed=seed,
        answer_tokens=answer_tokens,
        bos=bos,
    )
    measured = describe(settings[0], tokenizer) | {
        "context_lengths": list(context_lengths),
        "num_examples": num_examples,
    }
    check_same_on_all_hosts(measured)
    so_far: list[Result] = []

    def answer(examples: Sequence[Example], batch_size: int) -> list[str]:
        return generate_text(
            model,
            tokenizer,
            [prompt_ids(example, tokenizer, bos=bos) for example in examples],
            stop=(),
            max_new_tokens=max(example.answer_tokens for example in examples),
            batch_size=batch_size,
            on_text=lambda index, text: on_answer(),
        )

    def give_out(result: Result) -> None:
        so_far.append(result)
        on_result(RulerResults(measured, tuple(so_far)))

    found = measure(
        answer,
        tokenizer,
        tasks,
        settings,
        num_examples=num_examples,
        batch_tokens=batch_tokens,
        on_result=give_out,
    )
    return RulerResults(measured, found)


def check_ruler(tokenizer: Tokenizer, tasks: Sequence[str], context_lengths: Sequence[int], **settings: Any) -> None:
    """Refuses what `run_ruler` could not measure, after one example of each task and length.

    Args:
      tokenizer: the model's.
      tasks: as of `run_ruler`.
      context_lengths: as of `run_ruler`.
      **settings: `templates`, `essay`, `seed` and `answer_tokens` of `run_ruler`.

    Raises:
      EvaluationError, DataError: as `run_ruler` and `make_example`.
    """
    tasks = task_names(tasks)
    for task in tasks:
        check_task(task)
    for part in find_settings(context_lengths, words=None, split="validation", bos=False, **settings):
        for task in tasks:
            make_example(task, 0, tokenizer, part)


def find_settings(
    context_lengths: Sequence[int],
    *,
    templates: str,
    essay: str | None,
    words: str | None,
    split: Split,
    seed: int,
    answer_tokens: int | None,
    bos: bool,
) -> list[Settings]:
    """What examples of each context length depend on; arguments and errors as of `run_ruler`."""
    if not context_lengths or len(set(context_lengths)) < len(context_lengths):
        raise EvaluationError(f"name one or several different context lengths, got {list(context_lengths)}")
    sentences = find_templates(templates)
    first = Settings(
        context_length=context_lengths[0],
        split=split,
        seed=seed,
        templates=sentences,
        words=find_words(words, official=sentences is not OWN),
        essay=None if essay is None else Essay.read(essay),
        num_depths=NUM_DEPTHS,
        answer_tokens=answer_tokens,
        bos=bos,
    )
    return [dataclasses.replace(first, context_length=length) for length in context_lengths]


def task_names(names: Sequence[str]) -> list[str]:
    """The tasks of some names, of which `ruler` stands for all.

    Raises:
      EvaluationError: if there is none, or one comes twice.
    """
    tasks = [task for name in names for task in (TASKS if name == GROUP else (name,))]
    if not tasks or len(set(tasks)) < len(tasks):
        raise EvaluationError(f"name one or several different tasks, got {', '.join(names) or 'none'}")
    return tasks


def find_templates(name: str) -> Templates:
    """The templates of a name.

    Raises:
      EvaluationError: if there are none of this name, or those of the harness are not there.
    """
    match name:
        case "own":
            return OWN
        case "harness":
            return harness_templates()
    raise EvaluationError(f"templates must be harness or own, got {name!r}")


def describe(settings: Settings, tokenizer: Tokenizer) -> dict[str, Any]:
    """What examples depend on beside their task, length and number, as values that JSON can hold."""
    return {
        "tokenizer_hash": tokenizer.hash,
        "split": settings.split,
        "seed": settings.seed,
        "templates": settings.templates.source,
        "words": settings.words.source,
        "essay": None if settings.essay is None else settings.essay.name,
        "essay_hash": None if settings.essay is None else settings.essay.hash,
        "answer_tokens": settings.answer_tokens,
        "bos": settings.bos,
    }
