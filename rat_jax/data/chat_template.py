"""Chat templates: Jinja texts, as published beside tokenizers, that make one text of the messages of a chat.

A template reads `messages`, `add_generation_prompt` (whether the beginning of the next answer is to follow),
`eos_token`, and `bos_token`, which is empty: no model here reads a BOS. It runs in a sandbox. Where it writes
`eos_token`, the id that ends documents stands.

The file `chat_template.json` beside a tokenizer holds the template and its SHA-256.
"""

import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Sequence
from typing import Any, NoReturn

from rat_jax.data import DataError
from rat_jax.data.document import printable
from rat_jax.data.json_object import build, parse_object, read_bytes, require
from rat_jax.files import write_json

FILE = "chat_template.json"
END = "\ufdd0"  # what `eos_token` writes: no character of any text (Unicode keeps it for the inside of programs)
_ANSWERS = "assistant"  # the role whose messages are answers
# What evaluating a template may raise beside the errors of Jinja: operations on values of other types than it expects.
_ERRORS = (TypeError, ValueError, AttributeError, LookupError, ArithmeticError, RecursionError)


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """Makes texts of chats."""

    source: str

    @property
    def hash(self) -> str:
        """SHA-256 of the source, in hexadecimal."""
        return hashlib.sha256(self.source.encode()).hexdigest()

    def turns(self, messages: Sequence[dict[str, Any]], name: str) -> list[tuple[str, str]]:
        """The text before each answer of a chat, and the answer: together, with an end after each, they are the chat.

        An answer is what the template adds to a chat that ends with the beginning of an answer, up to `END` where the
        template writes one.

        Args:
          messages: objects with `role` and `content`, the last one an answer.
          name: of the chat, for messages.

        Raises:
          DataError: if the template refuses the chat, or its answers do not follow what it writes before them.
        """
        turns, said = [], ""  # the chat up to the end of the last answer
        for index, message in enumerate(messages):
            if message["role"] != _ANSWERS:
                continue
            before = self._render(messages[:index], True, name)
            chat = self._render(messages[: index + 1], False, name)
            if not (before.startswith(said) and len(before) > len(said) and chat.startswith(before)):
                raise DataError(
                    f"{name}: the chat template writes other text before answer {len(turns) + 1} once it is there, so "
                    f"that no model could go on with it: use a template that only adds text"
                )
            answer, has_end, _ = chat[len(before) :].partition(END)
            if not answer:
                raise DataError(f"{name}: the chat template writes nothing for answer {len(turns) + 1}")
            turns.append((before[len(said) :], answer))
            said = before + answer + has_end
        return turns

    def save(self, folder: pathlib.Path) -> None:
        """Writes the template into a folder, for `load_chat_template`; errors as of `write_json`."""
        write_json(folder / FILE, {"template": self.source, "hash": self.hash})

    def _render(self, messages: Sequence[dict[str, Any]], add_generation_prompt: bool, name: str) -> str:
        import jinja2

        try:
            return _compiled(self.source).render(
                messages=messages, add_generation_prompt=add_generation_prompt, bos_token="", eos_token=END
            )
        except (jinja2.TemplateError, *_ERRORS) as error:
            raise DataError(f"{name}: the chat template refuses it: {printable(error)[:300]}") from None


@functools.cache
def _compiled(source: str) -> Any:
    """Raises jinja2.TemplateError if it is no template."""
    import jinja2.sandbox

    # Blocks leave no line of their own, as templates of published tokenizers expect.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def _refuse(message: str) -> NoReturn:
    """What templates call for chats that they do not take."""
    import jinja2

    raise jinja2.TemplateError(message)


@dataclasses.dataclass(frozen=True)
class _Stored:
    template: str
    hash: str


def load_chat_template(folder: pathlib.Path) -> ChatTemplate | None:
    """The template that `ChatTemplate.save` wrote into a folder; None if there is none.

    Raises:
      DataError: if it was changed.
    """
    path = folder / FILE
    if not path.exists():
        return None
    stored = build(_Stored, parse_object(read_bytes(path), str(path)), str(path))
    template = ChatTemplate(stored.template)
    require(template.hash == stored.hash, str(path), "its hash is another one: it was changed after it was made")
    return template


def read_chat_template(path: pathlib.Path) -> ChatTemplate:
    """A template as it is published: a text, or the `chat_template` of a `tokenizer_config.json`.

    Raises:
      DataError: if there is none, or it is no Jinja.
    """
    import jinja2

    content = read_bytes(path)
    if path.suffix == ".json":
        values = parse_object(content, str(path))
        source = values.get("chat_template", values.get("template"))
        if isinstance(source, list):
            raise DataError(f"chat template {path} holds several: write the one to use into a file of its own")
        if not isinstance(source, str):
            raise DataError(f"chat template {path} holds no text chat_template (it has: {', '.join(values)[:200]})")
    else:
        try:
            source = content.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"chat template {path} is not UTF-8: {error.reason}") from None
    try:
        _compiled(source)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"chat template {path}, line {error.lineno} is no Jinja: {printable(error.message)}") from None
    return ChatTemplate(source)
