"""The first pass over prompts, in which those that cannot be continued are told of."""

import sys
from collections.abc import Iterable, Iterator

import tqdm

from rat_jax.sampling.prompts import Prompt, PromptError


class FirstPass:
    """Prompts, each of which is named on standard error if it is refused."""

    def __init__(self, prompts: Iterable[Prompt | PromptError]):
        """Takes prompts, with errors in place of those that cannot be read."""
        self._prompts = prompts
        self.num_prompts = self.num_refused = 0

    def __iter__(self) -> Iterator[Prompt | PromptError]:
        """The prompts with their errors; to be asked for once."""
        for prompt in self._prompts:
            self.num_prompts += 1
            if isinstance(prompt, PromptError):
                self.tell(prompt)
            yield prompt

    def tell(self, error: PromptError) -> None:
        """A prompt is skipped."""
        self.num_refused += 1
        tqdm.tqdm.write(f"skipped: {error}", file=sys.stderr)

    def report(self) -> None:
        """Says how many were skipped, if any."""
        if self.num_refused > 0:
            print(f"{self.num_refused:,} of {self.num_prompts:,} prompts were skipped", file=sys.stderr)

    def check_any_left(self) -> None:
        """Refuses prompts of which none can be continued.

        Raises:
          PromptError: saying so.
        """
        if self.num_prompts == 0:
            raise PromptError("there is nothing to continue: give --prompt or --prompts_file")
        if self.num_refused == self.num_prompts:
            raise PromptError(f"there is nothing to continue: all {self.num_prompts:,} prompts were skipped")
