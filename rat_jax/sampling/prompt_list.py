"""The prompts of a command line, and of a file that is read anew each time and never held."""

import pathlib
from collections.abc import Iterator, Sequence

from rat_jax.sampling.prompts import Prompt, PromptError, iterate_prompts


class PromptList:
    """Prompts one by one, those of flags first. Each pass over it gives the same."""

    def __init__(self, texts: Sequence[str], path: pathlib.Path | None, reserved: Sequence[str]):
        """Takes the flags; the file is opened by each pass.

        Args:
          texts: of flags.
          path: of a file, as `iterate_prompts` reads it.
          reserved: fields that the output adds, which no record may have.

        Raises:
          PromptError: if one of the flags is no text; or if the file is none that can be read more than once.
        """
        self._of_flags = [Prompt.of(text, f"--prompt number {number}") for number, text in enumerate(texts, start=1)]
        self._path, self._reserved = path, reserved
        if path is not None and path.exists() and not (path.is_file() or path.is_dir()):
            raise PromptError(f"{path} is no file, and prompts are read more than once: write them to a file")

    def __iter__(self) -> Iterator[Prompt | PromptError]:
        """The prompts, and in place of those that were refused the errors that say why; errors as `iterate_prompts`."""
        yield from self._of_flags
        if self._path is not None:
            yield from iterate_prompts(self._path, self._reserved)
