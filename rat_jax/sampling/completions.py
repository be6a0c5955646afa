"""Completions: texts that grow, and where they go: to standard output, or to a file."""

import sys
import time
from collections.abc import Sequence

import tqdm

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.sampling.output_file import OutputFile
from rat_jax.sampling.prompts import Prompt
from rat_jax.sampling.stop_strings import StoppedText

HELD_PER_SLOT = 8  # completions that may wait for an earlier one, for each text that is made at a time,
HELD = 256  # and so many more


class Completion:
    """A text that grows after its prompt."""

    def __init__(self, row: int, sample: int, prompt: Prompt, ids: Sequence[int], tokenizer: Tokenizer, stop: tuple):
        self.row, self.sample, self.prompt = row, sample, prompt
        self.tokens: list[int] = []  # with log-probabilities: up to the one that completes a stop string
        self.log_probs: list[float] = []
        self._text = StoppedText(tokenizer, ids, stop)
        self._searches = bool(stop)
        self._num_read = 0  # tokens whose text was asked for: to decode them all at once is the least work

    @property
    def text(self) -> str:
        """All of it so far."""
        self._read()
        return self._text.text

    @property
    def certain(self) -> str:
        """What will not change."""
        self._read()
        return self._text.certain

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came."""
        return self._text.is_stopped

    def add(self, tokens: Sequence[int], log_probs: Sequence[float] | None, is_end: bool) -> None:
        """Takes the next tokens, and whether they are the last."""
        size = 1 if self._searches and log_probs is not None else max(1, len(tokens))
        for start in range(0, len(tokens), size):
            if self.is_stopped:
                break
            part = slice(start, start + size)
            self.tokens += tokens[part]
            self.log_probs += [] if log_probs is None else log_probs[part]
            if self._searches:
                self._read()
        if is_end:
            self._read()
            self._text.push([])

    def _read(self) -> None:
        new, self._num_read = self.tokens[self._num_read :], len(self.tokens)
        if new:  # none would mean that the text is complete
            self._text.push(new)


class Printer:
    """Prints texts: a single one as it grows, several as they end."""

    def __init__(self, num_prompts: int, num_samples: int):
        """Takes how many there are, refused prompts among them."""
        self._num_prompts, self._num_samples = num_prompts, num_samples
        self._num_printed = 0  # characters of the single one
        self._is_single = num_prompts * num_samples == 1

    has_room = True  # for more texts

    def is_done(self, row: int) -> bool:
        """Whether a text was made before."""
        return False

    def skip(self, row: int) -> None:
        """There will be no such text."""

    def grow(self, completion: Completion) -> None:
        """There is more of a text."""
        if self._is_single:
            self._print_on(completion, completion.certain)

    def finish(self, completion: Completion) -> None:
        """A text is complete."""
        if self._is_single:
            self._print_on(completion, completion.text)
            _print("\n")
            return
        of_samples = f", sample {completion.sample + 1} of {self._num_samples}" if self._num_samples > 1 else ""
        number = completion.row // self._num_samples + 1
        _print(
            f"--- {number} of {self._num_prompts}{of_samples} ---\n{completion.prompt.text}{completion.text}\n",
        )

    def _print_on(self, completion: Completion, text: str) -> None:
        whole = completion.prompt.text + text
        _print(whole[self._num_printed :])
        self._num_printed = len(whole)


class FileWriter:
    """Writes texts to a file, under a bar of progress on standard error, where that is a terminal."""

    def __init__(self, file: OutputFile, num_slots: int):
        """Takes a file that has been told its settings, and how many texts are made at a time."""
        self._file = file
        self._most_held = HELD_PER_SLOT * num_slots + HELD
        self._num_tokens, self._since = 0, time.monotonic()
        self._bar = tqdm.tqdm(
            total=file.num_rows, initial=file.num_done, unit="text", disable=not sys.stderr.isatty(), leave=False
        )

    @property
    def has_room(self) -> bool:
        """Whether more texts may be begun: not while too many that are complete wait for one that is not."""
        return self._file.num_waiting < self._most_held

    def is_done(self, row: int) -> bool:
        """Whether a text is in the file."""
        return self._file.is_done(row)

    def grow(self, completion: Completion) -> None:
        """Nothing is written before a text is complete."""

    def finish(self, completion: Completion) -> None:
        """A text is complete.

        Raises:
          RunStopped: if it cannot be written.
        """
        self._num_tokens += len(completion.tokens)
        self._file.write(completion.row, completion.prompt, completion.text, completion.tokens, completion.log_probs)
        rate = self._num_tokens / max(1e-9, time.monotonic() - self._since)
        self._bar.set_postfix_str(f"{rate:,.0f} tokens/s", refresh=False)
        self._bar.update()

    def __enter__(self) -> "FileWriter":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.close()


def _print(text: str) -> None:
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, errors="replace").decode(encoding))  # a terminal may not know all characters
    sys.stdout.flush()
