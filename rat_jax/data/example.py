"""Examples: a prompt, and the answers that a model is to learn or is measured by.

A record of JSON lines, of Parquet or of a data set is one of

  {"prompt": "...", "answer": "..."}      the answer may be a list of texts, each as good as the others
  {"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...]}

A chat ends with a message of the role `assistant`; all messages of that role are answers. A chat template makes texts
of it (`rat_jax.data.chat_template`).
"""

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from rat_jax.data import DataError
from rat_jax.data.chat_template import END, ChatTemplate
from rat_jax.data.document import listed
from rat_jax.errors import shown

_FORM = '{"prompt": "...", "answer": "..."} or {"messages": [...]}'


class Turn(NamedTuple):
    """A text that is read, and the answer to it."""

    prompt: str  # may hold `END`
    answer: str


@dataclasses.dataclass(frozen=True)
class Example:
    """The last prompt of a record, its answers, and what came before them."""

    earlier: tuple[Turn, ...]  # of a chat
    prompt: str  # may hold `END`
    answers: tuple[str, ...]  # one at least

    @property
    def key(self) -> str:
        """What two examples have in common that must not be in different splits: all but the last answers."""
        return json.dumps([self.earlier, self.prompt])

    def to_text(self) -> str:
        """JSON, for `from_text`."""
        return json.dumps([self.earlier, self.prompt, self.answers])

    @classmethod
    def from_text(cls, text: str) -> "Example":
        earlier, prompt, answers = json.loads(text)
        return cls(tuple(Turn(*turn) for turn in earlier), prompt, tuple(answers))

    def texts(self) -> Iterator[str]:
        """All its texts."""
        for prompt, answer in self.earlier:
            yield from (*prompt.split(END), answer)
        yield from (*self.prompt.split(END), *self.answers)


@dataclasses.dataclass(frozen=True)
class ExampleReader:
    """Reads records as examples, in their JSON: a `read_record` of `rat_jax.data.document.ReadOptions`."""

    template: ChatTemplate | None  # None: there are no chats

    def __call__(self, record: Any, name: str) -> str:
        """Errors as of `read_example`."""
        return read_example(record, name, self.template).to_text()


def read_example(record: Any, name: str, template: ChatTemplate | None) -> Example:
    """The example of a record.

    Args:
      record: an object of the fields that the module names; others are left out.
      name: of its place, for messages.
      template: for chats.

    Raises:
      DataError: naming the field that is missing, empty or of another form.
    """
    if not isinstance(record, dict):
        raise DataError(f"{name} is no example, got {shown(record)}; expected {_FORM}")
    has_chat, has_prompt = "messages" in record, "prompt" in record
    if has_chat == has_prompt:
        what = "both a prompt and messages" if has_chat else f"neither prompt nor messages (it has: {listed(record)})"
        raise DataError(f"{name} has {what}; expected {_FORM}")
    if not has_chat:
        answers = record.get("answer")
        if not isinstance(answers, list):
            answers = [answers]
        if not answers:
            raise DataError(f"{name}: the list answer is empty; give one text at least")
        answers = tuple(_text(answer, "answer", name) for answer in answers)
        return Example((), _text(record["prompt"], "prompt", name), answers)
    if template is None:
        raise DataError(
            f"{name} holds a chat, and there is no template to make a text of it: give one with --chat_template when "
            f"the data are prepared, or records with prompt and answer"
        )
    *earlier, last = (Turn(*turn) for turn in template.turns(_messages(record["messages"], name), name))
    return Example(tuple(earlier), last.prompt, (last.answer,))


def _messages(messages: Any, name: str) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{name}: messages must be a list of objects with role and content, got {shown(messages)}")
    for number, message in enumerate(messages, start=1):
        place = f"{name}, message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{place} must be an object with role and content, got {shown(message)}")
        _text(message.get("content"), "content", place)
    if messages[-1]["role"] != "assistant":
        raise DataError(
            f"{name}: the last message must be an answer, of the role assistant, got {shown(messages[-1]['role'])}"
        )
    return messages


def _text(value: Any, field: str, name: str) -> str:
    if not isinstance(value, str):
        what = "missing" if value is None else f"{shown(value)}, which is no text"
        raise DataError(f"{name}: {field} is {what}; expected {_FORM}")
    if not value.strip():
        raise DataError(f"{name}: {field} is empty: give it text, or leave the record out")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise DataError(f"{name}: {field} holds half of a surrogate pair, which is no character: take it out") from None
    if END in value:
        raise DataError(f"{name}: {field} holds U+FDD0, which is no character of texts: take it out")
    return value
