"""Prompts: texts to continue, read from files with all that their records hold; and the tokenizer for them."""

import dataclasses
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus
from rat_jax.data.tokenizer import Tokenizer, load_tokenizer
from rat_jax.errors import RatJaxError, shown
from rat_jax.files import system_errors
from rat_jax.paths import local_path

# What an output line has beside the fields of its prompt: the continuation, and the settings that it was made with.
OUTPUT_FIELDS = ("completion", "sampling")


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
    def of_record(cls, record: Any, place: str) -> "Prompt":
        """The prompt of an object with a field `prompt`.

        Raises:
          PromptError: if the record has no such field, has one that the output adds, or its prompt is not text.
        """
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise PromptError(f'{place}: expected an object like {{"prompt": "text"}}, got {shown(record)}')
        for name in OUTPUT_FIELDS:
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
    """The prompts of a file: one a line, or by the end of its name JSON.

    .jsonl, .ndjson   an object with a field `prompt` a line
    .json             an array of texts, or of such objects

    Empty lines are skipped, and a byte-order mark is dropped.

    Raises:
      FileError: if the file cannot be read.
      PromptError: if it holds no prompts, naming the line.
    """
    with system_errors(path, "read"):
        content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise PromptError(f"{path}, line {line}: is not UTF-8: {error.reason}; convert the file to UTF-8") from None
    suffix = path.suffix.lower()
    if suffix == ".json":
        return _of_array(parse_json(text, str(path)), path)
    lines = [(f"{path}, line {i}", line.removesuffix("\r")) for i, line in enumerate(text.split("\n"), start=1)]
    if suffix in (".jsonl", ".ndjson"):
        return [Prompt.of_record(parse_json(line, place), place) for place, line in lines if line.strip()]
    return [Prompt.of(line, place) for place, line in lines if line]


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


def encode_prompts(prompts: Sequence[Prompt], tokenizer: Tokenizer) -> list[list[int]]:
    """The ids of each prompt; an empty one starts from the id that ends documents.

    Raises:
      PromptError: naming the prompt that the tokenizer refuses.
    """
    ids = []
    for prompt in prompts:
        try:
            ids.append(tokenizer.encode(prompt.text) or [tokenizer.eos_id])
        except DataError as error:
            raise PromptError(f"{prompt.place}: {error}") from None
    return ids


def find_tokenizer(workdir: Workdir, config: Config, data_path: str | None) -> Tokenizer:
    """The tokenizer of a workdir, or of a prepared corpus where the workdir holds none.

    Args:
      workdir: of the model.
      config: of the model; its `data.path` is where a corpus is looked for if `data_path` is None.
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
        folder = corpus or pathlib.Path(config.data.path)
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


def _of_array(values: Any, path: pathlib.Path) -> list[Prompt]:
    if not isinstance(values, list):
        raise PromptError(f"{path}: expected an array of prompts, got {shown(values)}; JSON lines are called .jsonl")
    places = [f"{path}, item {number}" for number in range(1, len(values) + 1)]
    return [
        Prompt.of(value, place) if isinstance(value, str) else Prompt.of_record(value, place)
        for value, place in zip(values, places, strict=True)
    ]


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text} is too large a number")
    return number
