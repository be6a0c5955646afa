"""Texts to continue: where they come from, and where they go with their continuations."""

import json
import pathlib

from rat_jax.checkpoints.workdir import Workdir
from rat_jax.config import Config
from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus
from rat_jax.data.tokenizer import Tokenizer, load_tokenizer
from rat_jax.errors import RatJaxError


class PromptError(RatJaxError, ValueError):
    """Prompts that cannot be read, or texts that cannot be written; the message names the file and the line."""


def read_prompts(path: pathlib.Path) -> list[str]:
    """The prompts of a file: one a line, or objects with a `prompt` a line if its name ends in .jsonl.

    Empty lines are skipped.

    Raises:
      PromptError: if the file cannot be read, naming the line.
    """
    try:
        lines = [line.removesuffix("\r") for line in path.read_text(encoding="utf-8").split("\n")]
    except OSError as error:
        raise PromptError(f"prompts file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PromptError(f"prompts file {path} is not UTF-8: {error}") from None
    if path.suffix != ".jsonl":
        return [line for line in lines if line]
    prompts = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            prompt = json.loads(line)["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError):
            prompt = None
        if not isinstance(prompt, str):
            raise PromptError(f'{path}, line {number}: expected an object like {{"prompt": "text"}}, got {line[:80]!r}')
        prompts.append(prompt)
    return prompts


def find_tokenizer(workdir: Workdir, config: Config, data_path: str | None) -> Tokenizer:
    """The tokenizer of a workdir, or of a prepared corpus where the workdir holds none.

    Args:
      workdir: of the model.
      config: of the model; its `data.path` is where a corpus is looked for if `data_path` is None.
      data_path: of a corpus.

    Raises:
      DataError: if there is none, or it is not the model's.
    """
    if workdir.tokenizer.is_dir():
        folder, tokenizer = workdir.tokenizer, load_tokenizer(workdir.tokenizer)
        if data_path is not None and Corpus.open(data_path).tokenizer_hash != tokenizer.hash:
            raise DataError(f"{data_path} was made by another tokenizer than the model's, which is in {folder}")
    else:
        folder = pathlib.Path(data_path or config.data.path)
        tokenizer = Corpus.open(folder).tokenizer()
    if tokenizer.vocab_size != config.model.vocab_size:
        raise DataError(
            f"the tokenizer in {folder} has a vocabulary of {tokenizer.vocab_size}, but the model's is "
            f"{config.model.vocab_size}: it belongs to another model"
        )
    return tokenizer
