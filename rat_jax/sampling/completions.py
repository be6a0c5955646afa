"""Completions: printed as they grow, and written as JSON lines."""

import json
import pathlib
import sys
from collections.abc import Sequence

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.sampling.prompts import PromptError
from rat_jax.sampling.stream_decoder import StreamDecoder


class CompletionWriter:
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
            decoder.begin(ids)
        self._completions: list[list[str]] = [[] for _ in prompts]
        if output_file is not None and output_file.exists():
            raise PromptError(f"output file {output_file} is there already: choose another name")
        self._output_file = output_file

    def add(self, index: int, ids: list[int]) -> None:
        """Takes the next tokens of a text; none mean that it is complete, as in `rat_jax.sampling.generation.generate`.

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
