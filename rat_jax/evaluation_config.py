"""The groups of a config that say what is measured while training, and how often.

A group whose `every_steps` is None is not measured. What can have no result is refused before a run begins: numbers
here, files and names by `rat_jax.training.evaluators`.
"""

import dataclasses
from typing import Any, Literal

from rat_jax.errors import require

NEW_TOKENS = 256  # of a generated text, where nothing else is said


def _check(group: Any, *, needed: str, counts: tuple[str, ...] = ()) -> None:
    """Refuses a group that is to be measured and lacks the field `needed`, and numbers below 1."""
    given = group.every_steps is not None
    require(not given or bool(getattr(group, needed)), f"{needed} must name at least one where every_steps is given")
    for name in ("every_steps", *counts):
        value = getattr(group, name)
        require(value is None or value >= 1, f"{name} must be 1 or more, got {value}")


@dataclasses.dataclass(frozen=True)
class LengthEvaluationConfig:
    """The loss of the validation split in sequences of other lengths, which are read in chunks with caches."""

    every_steps: int | None = None  # and after the last step; None: never
    lengths: tuple[int, ...] = ()  # tokens of a sequence
    max_batches: int = 4  # of each length, evenly spread; fewer if the split has fewer
    batch_tokens: int = 16_384  # computed at a time, over all devices; what memory it takes follows from it

    def __post_init__(self):
        _check(self, needed="lengths", counts=("max_batches", "batch_tokens"))
        require(all(length >= 1 for length in self.lengths), f"lengths must be 1 or more, got {self.lengths}")


@dataclasses.dataclass(frozen=True)
class RulerEvaluationConfig:
    """Greedy answers to generated examples of RULER's tasks."""

    every_steps: int | None = None  # and after the last step; None: never
    tasks: tuple[str, ...] = ()  # of `rat_jax.evaluation.ruler.TASKS`; ruler stands for all
    context_lengths: tuple[int, ...] = ()  # tokens of a prompt and the room for its answer
    num_examples: int = 100  # of each task and length
    templates: Literal["harness", "own"] = "harness"  # RULER's sentences, of the harness that is installed; short ones
    essay: str | None = None  # a file or folder of text that some tasks hide needles in; None: they are refused
    answer_tokens: int | None = None  # room for an answer; None: RULER's of each task
    seed: int = 0  # of the examples
    batch_tokens: int = 16_384  # of the contexts that are continued at a time; one at least

    def __post_init__(self):
        _check(self, needed="tasks", counts=("num_examples", "answer_tokens", "batch_tokens"))
        _check(self, needed="context_lengths")
        for length in self.context_lengths:
            require(length >= 1, f"context_lengths must be 1 or more, got {self.context_lengths}")


@dataclasses.dataclass(frozen=True)
class AnswersEvaluationConfig:
    """Greedy answers to the prompts of a file against its references."""

    every_steps: int | None = None  # and after the last step; None: never
    file: str | None = None  # JSON lines with prompt and answer, or chats
    context_length: int | None = None  # tokens of a prompt and its answer together; None: data.seq_len
    max_new_tokens: int = NEW_TOKENS  # of an answer; a prompt has the rest, and loses its middle where it is longer
    limit: int | None = None  # so many records alone, the first ones; None: all
    batch_tokens: int = 16_384  # of the prompts and answers that are computed at a time; one at least

    def __post_init__(self):
        _check(self, needed="file", counts=("context_length", "max_new_tokens", "limit", "batch_tokens"))


@dataclasses.dataclass(frozen=True)
class TasksEvaluationConfig:
    """Tasks of the lm-evaluation-harness, in contexts of data.seq_len tokens or as their group says."""

    every_steps: int | None = None  # and after the last step; None: never
    names: tuple[str, ...] = ()  # of tasks, or of groups of `rat_jax.evaluation.groups`
    folder: str | None = None  # of task files (YAML) beside the harness's own; None: there are none
    limit: int | None = None  # documents of each task; None: all
    batch_tokens: int = 16_384  # computed at a time, over all devices

    def __post_init__(self):
        _check(self, needed="names", counts=("limit", "batch_tokens"))


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """What is measured while training besides the validation loss, a group for each kind; a run is the same without."""

    # What becomes of a run whose evaluation has no result: "report" says why and goes on, "stop" ends it.
    on_failure: Literal["report", "stop"] = "report"
    length: LengthEvaluationConfig = LengthEvaluationConfig()
    ruler: RulerEvaluationConfig = RulerEvaluationConfig()
    answers: AnswersEvaluationConfig = AnswersEvaluationConfig()
    tasks: TasksEvaluationConfig = TasksEvaluationConfig()
