"""Examples of RULER's tasks, each made from its number alone, so that any part of a set can be made at any time."""

import dataclasses
import random
from typing import Any

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.ruler.coded_words import CodedWordsDraft
from rat_jax.evaluation.ruler.common_words import CommonWordsDraft
from rat_jax.evaluation.ruler.draft import Draft, Materials
from rat_jax.evaluation.ruler.filling import TooShortError, largest_fit
from rat_jax.evaluation.ruler.haystacks import Essay
from rat_jax.evaluation.ruler.items import Items, Split
from rat_jax.evaluation.ruler.niah import NEEDLES, NeedleDraft
from rat_jax.evaluation.ruler.templates import Templates
from rat_jax.evaluation.ruler.variable_tracking import VariableDraft
from rat_jax.evaluation.ruler.words import Words

TASKS = (*NEEDLES, "vt", "cwe", "fwe")
_ANSWER_TOKENS = dict.fromkeys(NEEDLES, 128) | {"vt": 30, "cwe": 120, "fwe": 50}  # RULER's tokens_to_generate
FILLED = 0.98  # of a context: the least that a prompt and the room for its answer take


@dataclasses.dataclass(frozen=True)
class Settings:
    """What examples depend on beside their task, their number and the tokenizer."""

    context_length: int  # tokens of the prompt and the room for its answer, a BOS included
    split: Split  # train and validation share no key, value, name, word to count or sentence of the essay
    seed: int
    templates: Templates
    words: Words
    essay: Essay | None  # for tasks that hide needles in one
    num_depths: int | None  # depths from 0 to 1 that the first needle takes by turns; None draws each depth
    answer_tokens: int | None  # room for the answer; None: RULER's of the task, or the answer's own where that is more
    bos: bool  # whether the id that ends documents comes before the prompt, in the place of a BOS

    def __post_init__(self):
        """Raises an `EvaluationError` if a number is out of range."""
        for name, value, least in (
            ("context_length", self.context_length, 1),
            ("num_depths", self.num_depths, 1),
            ("answer_tokens", self.answer_tokens, 1),
        ):
            if value is not None and value < least:
                raise EvaluationError(f"{name} must be {least} or more, got {value}")


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and its answers."""

    task: str
    index: int
    prompt: str
    answers: tuple[str, ...]
    depths: tuple[float, ...]  # share of the haystack before each answer's needle; empty where there are no needles
    prompt_tokens: int  # a BOS included
    answer_tokens: int  # room for the answer

    @property
    def answer(self) -> str:
        """What follows the prompt; the release's scoring reads it by its commas."""
        return f" {', '.join(self.answers)}"

    def as_json(self) -> dict[str, Any]:
        """The fields, as values that JSON can hold."""
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "answers": list(self.answers),
            "task": self.task,
            "index": self.index,
            "depth": round(self.depths[0], 4) if self.depths else None,
            "depths": [round(depth, 4) for depth in self.depths],
            "prompt_tokens": self.prompt_tokens,
            "answer_tokens": self.answer_tokens,
        }


def make_example(task: str, index: int, tokenizer: Tokenizer, settings: Settings) -> Example:
    """Example number `index` of a task; the same for the same arguments.

    Raises:
      EvaluationError: if the task is unknown, needs an essay that is not there, or does not fit the context length.
    """
    check_task(task)
    key = f"{settings.seed} {settings.split} {task} {settings.context_length} {index}"
    room = settings.answer_tokens or _ANSWER_TOKENS[task]

    def count(prompt: str) -> int:
        return len(tokenizer.encode(prompt)) + settings.bos

    depth = None
    if settings.num_depths is not None:
        depth = index % settings.num_depths / max(1, settings.num_depths - 1)
    materials = Materials(
        items=Items(random.Random(key), settings.split, settings.words),
        templates=settings.templates,
        split=settings.split,
        essay=settings.essay,
        depth=depth,
        context_length=settings.context_length,
        fits=lambda prompt: count(prompt) + room <= settings.context_length,
    )
    draft = _draft(task, materials)
    own_room = len(tokenizer.encode(f" {', '.join(draft.answers)}")) + 1  # and the end of the document
    if settings.answer_tokens is None:
        room = max(room, own_room)
    elif room < own_room:
        raise EvaluationError(f"{task}: an answer has {own_room} tokens, answer_tokens is {room}: raise it")
    limit = settings.context_length - room
    try:
        size = largest_fit(lambda size: count(draft.render(size).prompt), limit, least=draft.least)
        rendered = draft.render(size)
        if draft.takes_filler and count(rendered.prompt) + room < FILLED * settings.context_length:
            num_filler = largest_fit(lambda words: count(draft.render(size, words).prompt), limit, least=0)
            rendered = draft.render(size, num_filler)
    except TooShortError as error:
        raise EvaluationError(
            f"{task} does not fit {settings.context_length} tokens: with this tokenizer the shortest prompt has "
            f"{error.num_tokens}, the answer {room}: choose a length of {error.num_tokens + room} or more"
        ) from None
    num_tokens = count(rendered.prompt)
    if num_tokens + room < FILLED * settings.context_length:
        raise EvaluationError(
            f"{task} fills only {num_tokens + room} of {settings.context_length} tokens: choose a longer context"
        )
    return Example(task, index, rendered.prompt, draft.answers, rendered.depths, num_tokens, room)


def check_task(task: str) -> None:
    """Refuses a task that there is not.

    Raises:
      EvaluationError: naming those that there are.
    """
    if task not in TASKS:
        raise EvaluationError(f"there is no RULER task {task!r}; those that can be made are {', '.join(TASKS)}")


def prompt_ids(example: Example, tokenizer: Tokenizer, *, bos: bool) -> list[int]:
    """What a model reads of an example: a BOS only where it is asked for, and nothing else that is no text."""
    return [tokenizer.eos_id] * bos + tokenizer.encode(example.prompt)


def _draft(task: str, materials: Materials) -> Draft:
    match task:
        case "vt":
            return VariableDraft(materials)
        case "cwe":
            return CommonWordsDraft(materials)
        case "fwe":
            return CodedWordsDraft(materials)
    return NeedleDraft(task, materials)
