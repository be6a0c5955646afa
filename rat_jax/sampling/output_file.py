"""The file that completions go to: JSON lines in the order of the prompts, gone on with where an earlier run ended."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rat_jax.errors import RunStopped
from rat_jax.files import FileError, system_errors
from rat_jax.sampling.prompts import OUTPUT_FIELDS, Prompt, PromptError, parse_json

_COMPLETION, _SAMPLING = OUTPUT_FIELDS


class OutputFile:
    """A line for each prompt: the fields of its record, `completion`, and `sampling`, the settings.

    Line i is of prompt i. Whole lines that are there stay as they are and are not made again; the beginning of a line
    that a kill left is written anew. Equal prompts have a line each. A line that stands there twice would be of two
    prompts: it is refused unless they are equal.
    """

    def __init__(self, path: pathlib.Path, prompts: Sequence[Prompt], remedy: str = "choose another name"):
        """Looks at what is there, and whether the file can be written; changes nothing.

        Args:
          path: of the file.
          prompts: whose completions it holds.
          remedy: what to do where it holds something else, for messages.

        Raises:
          FileError: if the file cannot be read or written.
          PromptError: if it holds anything but completions of the first prompts.
        """
        self.path = path
        self._prompts = prompts
        self._remedy = remedy
        self._settings: Mapping[str, Any] = {}
        self._waiting: dict[int, dict[str, Any]] = {}  # records whose predecessors are not there yet
        exists = path.exists()
        if exists and not path.is_file():
            raise PromptError(f"output file {path} is no file: {self._remedy}")
        with system_errors(path, "read"):
            content = path.read_bytes() if exists else b""
        *lines, rest = content.split(b"\n")
        self._num_bytes = len(content)  # of the file, as far as is known here
        self._kept_bytes: int | None = len(content) - len(rest)  # a line that was cut short is written again
        records = [self._read(number, line) for number, line in enumerate(lines)]
        self._completions = [record[_COMPLETION] for record in records]
        self._made_with = [record[_SAMPLING] for record in records]
        if rest:
            self._check_cut_line(rest)
        with system_errors(path, "written"):
            path.open("ab").close()
            if not exists:
                path.resolve().unlink()  # what was just made, not a link to it

    @property
    def num_done(self) -> int:
        """Prompts whose lines are there."""
        return len(self._completions)

    @property
    def completions(self) -> list[str]:
        """Those that are there."""
        return list(self._completions)

    def go_on(self, settings: Mapping[str, Any]) -> None:
        """Says with which settings the next lines are made, as values that JSON can hold.

        Raises:
          PromptError: if lines that are there were made with others.
        """
        for number, there in enumerate(self._made_with, start=1):
            changes = [
                f"{name} was {there.get(name)!r}, is {settings.get(name)!r}"
                for name in {**settings, **there}
                if there.get(name) != settings.get(name)
            ]
            if changes:
                raise PromptError(
                    f"output file {self.path}, line {number}, was made with other settings: {'; '.join(changes)}; set "
                    f"them back, or choose another name"
                )
        self._settings = settings

    def write(self, index: int, completion: str) -> None:
        """Adds the line of a prompt, as soon as those of all prompts before it are there.

        Raises:
          RunStopped: if the system refuses, or another process has written to the file; the lines before stay.
        """
        self._waiting[index] = {**self._prompts[index].fields, _COMPLETION: completion, _SAMPLING: self._settings}
        try:
            with system_errors(self.path, "written"), self.path.open("ab") as file:
                if file.tell() != self._num_bytes:
                    raise RunStopped(
                        f"{self.path} was changed by another process: wait until it has ended, and give the command "
                        f"again"
                    )
                if self._kept_bytes is not None:
                    file.truncate(self._kept_bytes)
                    self._num_bytes, self._kept_bytes = self._kept_bytes, None
                while (record := self._waiting.pop(self.num_done, None)) is not None:
                    file.write(f"{json.dumps(record)}\n".encode())
                    file.flush()
                    self._num_bytes = file.tell()
                    self._completions.append(record[_COMPLETION])
                    self._made_with.append(record[_SAMPLING])
        except FileError as error:
            raise RunStopped(
                f"{error}; {self.num_done} of {len(self._prompts)} completions are there, and the same command goes on"
            ) from None

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        place = f"output file {self.path}, line {number + 1}"
        if number >= len(self._prompts):
            raise PromptError(f"{place}: there are only {len(self._prompts)} prompts: {self._remedy}")
        try:
            record = parse_json(line.decode(), place)
        except UnicodeDecodeError:
            raise PromptError(f"{place}: is not text: {self._remedy}") from None
        prompt = self._prompts[number]
        is_ours = isinstance(record, dict) and (
            {name: value for name, value in record.items() if name not in OUTPUT_FIELDS} == prompt.fields
            and isinstance(record.get(_COMPLETION), str)
            and isinstance(record.get(_SAMPLING), dict)
        )
        if not is_ours:
            raise PromptError(f"{place}: is no completion of {prompt.place}: {self._remedy}")
        return record

    def _check_cut_line(self, rest: bytes) -> None:
        """A kill in the middle of a write leaves the beginning of the next line."""
        if self.num_done < len(self._prompts):
            beginning = json.dumps(self._prompts[self.num_done].fields)[:-1].encode() + f', "{_COMPLETION}": "'.encode()
            if rest.startswith(beginning[: len(rest)]):
                return
        raise PromptError(
            f"output file {self.path}, line {self.num_done + 1}: is no beginning of a completion: {self._remedy}"
        )
