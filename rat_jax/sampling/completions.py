"""Completions: printed as they grow, and handed to the file that keeps them."""

import sys
from collections.abc import Sequence

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.sampling.output_file import OutputFile
from rat_jax.sampling.prompts import Prompt, encode_prompts
from rat_jax.sampling.stream_decoder import StreamDecoder


class CompletionWriter:
    """Prompts and what they become: printed, a single one as it grows, and written if there is a file for them."""

    def __init__(self, prompts: Sequence[Prompt], tokenizer: Tokenizer, output_file: OutputFile | None):
        """Makes the ids.

        Raises:
          PromptError: if the tokenizer refuses a prompt.
        """
        self.prompt_ids = encode_prompts(prompts, tokenizer)
        self.eos_id = tokenizer.eos_id
        self._prompts = [prompt.text for prompt in prompts]
        self._decoders = [StreamDecoder(tokenizer) for _ in prompts]
        for decoder, ids in zip(self._decoders, self.prompt_ids, strict=True):
            decoder.begin(ids)
        self._completions: list[list[str]] = [[] for _ in prompts]
        self._output_file = output_file

    def add(self, index: int, ids: list[int]) -> None:
        """Takes the next tokens of a text; none mean that it is complete, as in `rat_jax.sampling.generation.generate`.

        Raises:
          RunStopped: if the output file cannot be written.
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
            self._output_file.write(index, completion)


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))  # a terminal may not know all characters
    sys.stdout.flush()
