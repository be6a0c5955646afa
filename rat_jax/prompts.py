"""Texts to continue: where they come from, and where they go with their continuations."""

import json
import pathlib
import sys
from collections.abc import Sequence

from rat_jax.config import Config
from rat_jax.data import DataError
from rat_jax.data.corpus import Corpus
from rat_jax.data.stream_decoder import StreamDecoder
from rat_jax.data.tokenizer import Tokenizer, load_tokenizer
from rat_jax.workdir import Workdir


class PromptError(ValueError):
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


class Texts:
    """Prompts and what they become: printed, a single one as it grows, and written as JSON lines if asked."""

    def __init__(self, prompts: Sequence[str], tokenizer: Tokenizer, output_file: pathlib.Path | None):
        """Makes the ids; an empty prompt starts from the id that ends documents.

        Raises:
          DataError: if the tokenizer refuses a prompt.
          PromptError: if the output file is there already.
        """
        self.prompt_ids = [tokenizer.encode(prompt) or [tokenizer.eos_id] for prompt in prompts]
        self._prompts = list(prompts)
        self._decoders = [StreamDecoder(tokenizer) for _ in prompts]
        for decoder, ids in zip(self._decoders, self.prompt_ids, strict=True):
            decoder.push(ids)
        self._completions: list[list[str]] = [[] for _ in prompts]
        if output_file is not None and output_file.exists():
            raise PromptError(f"output file {output_file} is there already: choose another name")
        self._output_file = output_file

    def add(self, index: int, ids: list[int]) -> None:
        """Takes the next tokens of a text; none mean that it is complete, as in `rat_jax.sampling.generate`.

        Raises:
          PromptError: if the output file cannot be written.
        """
        if len(self._prompts) == 1 and not self._completions[index]:
            _print(self._prompts[index])
        decoder = self._decoders[index]
        text = decoder.push(ids) if ids else decoder.flush()
        self._completions[index].append(text)
        if len(self._prompts) == 1:
            _print(text if ids else f"{text}\n")
        if not ids:
            self._finish(index)

    def _finish(self, index: int) -> None:
        prompt, completion = self._prompts[index], "".join(self._completions[index])
        if len(self._prompts) > 1:
            _print(f"--- {index + 1} of {len(self._prompts)} ---\n{prompt}{completion}\n")
        if self._output_file is not None:
            self._write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")

    def _write(self, line: str) -> None:
        try:
            with self._output_file.open("a", encoding="utf-8") as file:
                file.write(line)
        except OSError as error:
            raise PromptError(f"output file {self._output_file} cannot be written: {error.strerror}") from None


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))  # a terminal may not know all characters
    sys.stdout.flush()
