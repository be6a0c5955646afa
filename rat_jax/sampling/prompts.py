"""Prompts: texts to continue, read from files with all that their records hold; and the tokenizer for them."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus
from rat_jax.data.tokenizer import Tokenizer, load_tokenizer
from rat_jax.errors import RatJaxError, shown
from rat_jax.files import system_errors
from rat_jax.paths import local_path

# What an output line has beside the fields of its prompt: the continuation, the settings that it was made with, and
# where its place does not say it, the number of the prompt.
OUTPUT_FIELDS = ("completion", "sampling", "prompt_number")


class PromptError(RatJaxError, ValueError):
    """Prompts that cannot be read, or an output that is not theirs; the message names file and line."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    text: str
    place: str  # where it was given, for messages
    fields: Mapping[str, Any]  # of its record, `prompt` among them: values that JSON can hold

    @classmethod
    def of(cls, text: str, place: str) -> "Prompt":
        """A prompt that came without a record.

        Raises:
          PromptError: if it is not text.
        """
        return cls.of_record({"prompt": text}, place)

    @classmethod
    def of_record(cls, record: Any, place: str, reserved: Sequence[str] = OUTPUT_FIELDS) -> "Prompt":
        """The prompt of an object with a field `prompt`; `reserved` are the fields that the output adds.

        Raises:
          PromptError: if the record has no such field, has one that the output adds, or its prompt is not text.
        """
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise PromptError(f'{place}: expected an object like {{"prompt": "text"}}, got {shown(record)}')
        for name in reserved:
            if name in record:
                raise PromptError(f"{place}: has a field {name!r}, which the output adds: give it another name")
        text = record["prompt"]
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise PromptError(
                f"{place}: {text[error.start]!a} at position {error.start} is no character (bytes that are not "
                f"UTF-8, or half of a surrogate pair): mend the text"
            ) from None
        return cls(text, place, record)


def read_prompts(path: pathlib.Path) -> list[Prompt]:
    """All prompts of a file, as of `iterate_prompts`.

    Raises:
      FileError: if the file cannot be read.
      PromptError: if it holds anything else, naming the line.
    """
    prompts = []
    for prompt in iterate_prompts(path):
        if isinstance(prompt, PromptError):
            raise prompt
        prompts.append(prompt)
    return prompts


def iterate_prompts(path: pathlib.Path, reserved: Sequence[str] = OUTPUT_FIELDS) -> Iterator[Prompt | PromptError]:
    """The prompts of a file, one by one: one a line, or by the end of its name JSON.

    .jsonl, .ndjson   an object with a field `prompt` a line
    .json             an array of texts, or of such objects; the only kind that is read as a whole

    Empty lines are skipped, and a byte-order mark is dropped.

    Args:
      path: of the file.
      reserved: fields that the output adds, which no record may have.

    Yields:
      Each prompt, or in its place the error that names its line and says what is wrong with it.

    Raises:
      FileError: if the file cannot be read.
      PromptError: if a .json file holds no array.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        with system_errors(path, "read"):
            content = path.read_bytes()
        yield from _of_array(parse_json(_decoded(content, str(path)), str(path)), path, reserved)
        return
    has_records = suffix in (".jsonl", ".ndjson")
    with system_errors(path, "read"):
        file = path.open("rb")
    with file:
        number = 0
        while True:
            with system_errors(path, "read"):
                line = file.readline()
            if not line:
                return
            number += 1
            try:
                prompt = _of_line(line, number, path, reserved if has_records else None)
            except PromptError as error:
                prompt = error
            if prompt is not None:
                yield prompt


def parse_json(text: str, place: str) -> Any:
    """What a text of JSON holds.

    Raises:
      PromptError: if it is none, or holds what could not be written again: NaN, infinity, very deep nesting.
    """
    try:
        value = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
        json.dumps(value)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{place}: is not JSON: {error}; got {shown(text)}") from None
    return value


def encode_prompt(prompt: Prompt, tokenizer: Tokenizer) -> list[int]:
    """The ids of a prompt; an empty one starts from the id that ends documents.

    Raises:
      PromptError: if the tokenizer refuses it.
    """
    try:
        return tokenizer.encode(prompt.text) or [tokenizer.eos_id]
    except DataError as error:
        raise PromptError(f"{prompt.place}: {error}") from None


def find_tokenizer(workdir: Workdir, config: Config, data_path: str | None) -> Tokenizer:
    """The tokenizer of a workdir, or of a prepared corpus where the workdir holds none.

    Args:
      workdir: of the model.
      config: of the model; its first corpus is read if `data_path` is None.
      data_path: of a corpus.

    Raises:
      DataError: if there is none, or it is not the model's.
    """
    corpus = None if data_path is None else local_path(data_path, "--data_path")
    if workdir.tokenizer.is_dir():
        folder, tokenizer = workdir.tokenizer, load_tokenizer(workdir.tokenizer)
        if corpus is not None:
            Corpus.open(corpus).check_tokenizer(folder)
    else:
        folder = corpus or pathlib.Path(next(iter(config.data.paths.values())))
        if corpus is None and not folder.exists():
            raise DataError(
                f"{workdir.path} has no tokenizer, and {folder}, which the model was trained on, is not there: name a "
                f"corpus with --data_path"
            )
        tokenizer = Corpus.open(folder).tokenizer()
    if tokenizer.vocab_size != config.model.vocab_size:
        raise DataError(
            f"the tokenizer in {folder} has a vocabulary of {tokenizer.vocab_size}, but the model's is "
            f"{config.model.vocab_size}: it belongs to another model"
        )
    return tokenizer


def _of_line(line: bytes, number: int, path: pathlib.Path, reserved: Sequence[str] | None) -> Prompt | None:
    """The prompt of a line, None if it is empty; `reserved`: None where lines are texts, not records."""
    place = f"{path}, line {number}"
    text = _decoded(line, place, "utf-8-sig" if number == 1 else "utf-8").removesuffix("\n").removesuffix("\r")
    if reserved is None:
        return Prompt.of(text, place) if text else None
    return Prompt.of_record(parse_json(text, place), place, reserved) if text.strip() else None


def _decoded(content: bytes, place: str, encoding: str = "utf-8-sig") -> str:
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        raise PromptError(f"{place}: is not UTF-8: {error.reason}; convert the file to UTF-8") from None


def _of_array(values: Any, path: pathlib.Path, reserved: Sequence[str]) -> Iterator[Prompt | PromptError]:
    if not isinstance(values, list):
        raise PromptError(f"{path}: expected an array of prompts, got {shown(values)}; JSON lines are called .jsonl")
    for number, value in enumerate(values, start=1):
        place = f"{path}, item {number}"
        try:
            yield Prompt.of(value, place) if isinstance(value, str) else Prompt.of_record(value, place, reserved)
        except PromptError as error:
            yield error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is too large a number")
    return number
