"""The first pass over prompts, in which those that cannot be continued are told of."""

import hashlib
import sys
from collections.abc import Iterable, Iterator

import tqdm

from rat_jax.checkpoints.hosts import difference_from_first
from rat_jax.sampling.prompts import Prompt, PromptError


class FirstPass:
    """Prompts, each of which is named on standard error if it is refused."""

    def __init__(self, prompts: Iterable[Prompt | PromptError]):
        """Takes prompts, with errors in place of those that cannot be read."""
        self._prompts = prompts
        self._digest = hashlib.sha256()
        self.num_prompts = self.num_refused = 0

    def __iter__(self) -> Iterator[Prompt | PromptError]:
        """The prompts with their errors; to be asked for once."""
        for prompt in self._prompts:
            self.num_prompts += 1
            self._digest.update(f"{prompt!r}\n".encode())
            if isinstance(prompt, PromptError):
                self.tell(prompt)
            yield prompt

    def check_same_on_all_hosts(self) -> None:
        """Refuses hosts that have other prompts than the first one. All must call this together, after the pass.

        Raises:
          PromptError: naming the host.
        """
        if (difference := difference_from_first({"SHA-256": self._digest.hexdigest()})) is not None:
            raise PromptError(f"the hosts have different prompts: {difference}")

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
