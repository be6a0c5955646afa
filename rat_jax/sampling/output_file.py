"""The file that completions go to: JSON lines, gone on with where an earlier run ended."""

import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO, Literal

import jax

from rat_jax.checkpoints.hosts import on_first_host
from rat_jax.errors import RunStopped
from rat_jax.files import FileError, system_errors
from rat_jax.sampling.prompts import OUTPUT_FIELDS, Prompt, PromptError, parse_json

_COMPLETION, _SAMPLING, _NUMBER = OUTPUT_FIELDS
_SAMPLE, _TOKENS, _LOG_PROBS = "sample", "tokens", "log_probs"
Order = Literal["input", "arrival"]


def added_fields(num_samples: int, with_log_probs: bool) -> tuple[str, ...]:
    """What the lines have beside the fields of their prompts."""
    return (*OUTPUT_FIELDS, *([_SAMPLE] if num_samples > 1 else []), *([_TOKENS, _LOG_PROBS] if with_log_probs else []))


class OutputFile:
    """A line for each sample of each prompt, in their order or as they come.

    A line has the fields of its prompt's record, `completion`, `sample` (from 0 on) where a prompt has several,
    `tokens` and `log_probs` where they are wanted, `prompt_number`, and `sampling`, the settings.

    `prompt_number` counts prompts from 1 on, refused ones too. A line without it is of the prompt after that of the
    line before, or of its next sample; in the order of the prompts only lines that follow a gap have it. So the file
    alone says what is done. Whole lines that are there stay as they are and are not made again; the beginning of a line
    that a kill left is written anew. Equal prompts have a line each.

    Rows are numbered from 0 on: prompts by their place, refused ones too, times `num_samples`, plus the sample. Of
    lines that were written the file holds the rows' numbers alone in memory.

    Several hosts make and use it together: the first alone reads and writes the file, and the others know what is done.
    """

    def __init__(
        self,
        path: pathlib.Path,
        prompts: Iterable[Prompt | PromptError],
        remedy: str = "choose another name",
        *,
        order: Order = "input",
        num_samples: int = 1,
        with_log_probs: bool = False,
    ):
        """Looks at what is there, and whether the file can be written; changes nothing.

        Args:
          path: of the file.
          prompts: whose completions it holds, read once; in place of those that were refused their errors.
          remedy: what to do where it holds something else, for messages.
          order: of lines that are written.
          num_samples: of each prompt.
          with_log_probs: whether lines hold tokens and their log-probabilities.

        Raises:
          FileError: if the file cannot be read or written.
          PromptError: if it holds anything but completions of the prompts.
          CheckpointError: where the first of several hosts raises one of these.
        """
        self.path = path
        self._remedy, self._order, self._num_samples = remedy, order, num_samples
        self._added = added_fields(num_samples, with_log_probs)
        self._settings: Mapping[str, Any] = {}
        self._made_with: dict[str, int] = {}  # settings of lines that are there, as JSON: the first such line
        self._done: set[int] = set()
        self._skipped: set[int] = set()
        self._next = 0  # the row that is written next in the order of the prompts
        self._last = -1  # the row of the last line
        self._waiting: dict[int, dict[str, Any]] = {}  # records whose predecessors are not there yet
        self.num_rows = 0
        self._num_bytes = 0  # of the file, as far as is known here
        self._kept_bytes: int | None = 0  # a line that was cut short is written again
        self._is_ours = jax.process_index() == 0
        found = on_first_host(lambda: self._look(prompts))
        if not self._is_ours:
            self._match(prompts, None, {}, b"")
            self._done, self._last = set(found["done"]), found["last"]

    @property
    def num_done(self) -> int:
        """Rows whose lines are there."""
        return len(self._done)

    @property
    def num_waiting(self) -> int:
        """Rows that wait in memory for the lines before them."""
        return len(self._waiting)

    @property
    def completions(self) -> list[str]:
        """Those that are there, read anew; the first host's alone."""
        if not self._done or not self._is_ours:
            return []
        with system_errors(self.path, "read"):
            return [json.loads(line)[_COMPLETION] for line in self.path.read_bytes().split(b"\n")[: self.num_done]]

    def is_done(self, row: int) -> bool:
        """Whether a row's line is there."""
        return row in self._done

    def go_on(self, settings: Mapping[str, Any]) -> None:
        """Says with which settings the next lines are made, as values that JSON can hold.

        Raises:
          PromptError: if lines that are there were made with others.
        """
        on_first_host(lambda: self._check_settings(settings))
        self._settings = settings

    def skip(self, row: int) -> None:
        """Says that a row will have no line: those behind it need not wait for it."""
        self._skipped.add(row)
        self.num_rows -= 1

    def write(
        self, row: int, prompt: Prompt, completion: str, tokens: list[int] | None = None, log_probs: list | None = None
    ) -> None:
        """Adds the line of a row: at once, or as soon as those of all rows before it are there.

        Raises:
          RunStopped: if the system refuses, or another process has written to the file; the lines before stay.
        """
        values = {_COMPLETION: completion, _SAMPLE: row % self._num_samples, _TOKENS: tokens, _LOG_PROBS: log_probs}
        added = {name: value for name, value in values.items() if name in self._added}
        self._waiting[row] = {**prompt.fields, **added}
        if not self._is_ours:
            for ready in self._ready():
                del self._waiting[ready]
                self._note(ready)
            return
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
                for ready in self._ready():
                    record = self._waiting.pop(ready)
                    if self._order == "arrival" or not self._follows(ready):
                        record[_NUMBER] = ready // self._num_samples + 1
                    record[_SAMPLING] = self._settings
                    file.write(f"{json.dumps(record)}\n".encode())
                    file.flush()
                    self._num_bytes = file.tell()
                    self._note(ready)
        except FileError as error:
            raise RunStopped(
                f"{error}; {self.num_done} of {self.num_rows} completions are there, and the same command goes on"
            ) from None

    def _check_settings(self, settings: Mapping[str, Any]) -> None:
        for text, number in self._made_with.items():
            there = json.loads(text)
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

    def _look(self, prompts: Iterable[Prompt | PromptError]) -> dict[str, Any]:
        """Reads the file; what other hosts must know of it."""
        path, exists = self.path, self.path.exists()
        if exists and not path.is_file():
            raise PromptError(f"output file {path} is no file: {self._remedy}")
        if exists:
            with system_errors(path, "read"), path.open("rb") as file:
                places, rest = self._read_lines(file)
                self._match(prompts, file, places, rest)
        else:
            self._match(prompts, None, {}, b"")
        with system_errors(path, "written"):
            path.open("ab").close()
            if not exists:
                path.resolve().unlink()  # what was just made, not a link to it
        return {"done": sorted(self._done), "last": self._last}

    def _note(self, row: int) -> None:
        """The line of a row is there."""
        self._done.add(row)
        self._last = row

    def _ready(self) -> Iterator[int]:
        """The rows that can be written now; each is written before the next is asked for."""
        if self._order == "arrival":
            yield from list(self._waiting)
            return
        while True:
            while self._next in self._done or self._next in self._skipped:
                self._next += 1
            if self._next not in self._waiting:
                return
            yield self._next

    def _follows(self, row: int) -> bool:
        """Whether a line after the last needs no number to be of this row."""
        is_next_prompt = row // self._num_samples == self._last // self._num_samples + 1
        return row == self._last + 1 if row % self._num_samples else is_next_prompt

    def _read_lines(self, file: BinaryIO) -> tuple[dict[int, tuple[int, int]], bytes]:
        """The number and place in the file of each row's line, and what was written of a line that is not whole."""
        places: dict[int, tuple[int, int]] = {}
        start = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                self._num_bytes, self._kept_bytes = start + len(line), start
                return places, line
            record = self._parse(number, line)
            values = record if isinstance(record, dict) else {}
            row = self._row(values)
            if row in places:
                raise PromptError(
                    f"output file {self.path}, line {number}: is of the same prompt as line {places[row][0]}: "
                    f"{self._remedy}"
                )
            places[row] = number, start
            if isinstance(values.get(_SAMPLING), dict):
                self._made_with.setdefault(json.dumps(values[_SAMPLING]), number)
            self._last = row
            start += len(line)
        self._num_bytes = self._kept_bytes = start
        return places, b""

    def _row(self, record: Mapping[str, Any]) -> int:
        """The row of the line after that of `_last`."""
        sample = record.get(_SAMPLE) if self._num_samples > 1 else 0
        sample = sample if type(sample) is int and 0 <= sample < self._num_samples else 0  # others are refused below
        prompt = self._last // self._num_samples
        if _NUMBER in record:
            prompt = record[_NUMBER] - 1 if type(record[_NUMBER]) is int and record[_NUMBER] >= 1 else prompt + 1
        elif sample == 0 or self._last < 0:
            prompt += 1
        return prompt * self._num_samples + sample

    def _match(
        self,
        prompts: Iterable[Prompt | PromptError],
        file: BinaryIO | None,
        places: dict[int, tuple[int, int]],
        rest: bytes,
    ) -> None:
        """Compares lines with the prompts that they should be of."""
        num_lines, num_prompts, is_beginning = len(places), 0, False
        for prompt in prompts:
            rows = range(num_prompts * self._num_samples, (num_prompts + 1) * self._num_samples)
            num_prompts += 1
            if isinstance(prompt, PromptError):
                self._skipped.update(rows)
                for row in rows:
                    if row in places:
                        raise PromptError(
                            f"output file {self.path}, line {places[row][0]}: is of a prompt that cannot be read: "
                            f"{prompt}"
                        )
                continue
            self.num_rows += len(rows)
            for row in rows:
                if row in places:
                    number, start = places.pop(row)
                    file.seek(start)
                    self._check(self._parse(number, file.readline()), prompt, row, number)
                    self._done.add(row)
                elif rest and not is_beginning:
                    beginning = f'{json.dumps(prompt.fields)[:-1]}, "{_COMPLETION}": "'.encode()
                    is_beginning = rest.startswith(beginning[: len(rest)])
        if places:
            number = min(number for number, _ in places.values())
            raise PromptError(
                f"output file {self.path}, line {number}: there are only {num_prompts} prompts: {self._remedy}"
            )
        if rest and not is_beginning:
            raise PromptError(
                f"output file {self.path}, line {num_lines + 1}: is no beginning of a completion: {self._remedy}"
            )

    def _check(self, record: Any, prompt: Prompt, row: int, number: int) -> None:
        place = f"output file {self.path}, line {number}"
        values = record if isinstance(record, dict) else {}
        is_completion = isinstance(values.get(_COMPLETION), str) and isinstance(values.get(_SAMPLING), dict)
        fields = {name: value for name, value in values.items() if name not in self._added}
        needed = set(self._added) - {_NUMBER}
        is_whole = needed <= values.keys() and (self._num_samples == 1 or values[_SAMPLE] == row % self._num_samples)
        if is_completion and fields == prompt.fields and is_whole:
            return
        if is_completion and prompt.fields.items() <= values.items():
            raise PromptError(
                f"{place}: was made with another number of samples, or other wishes for log-probabilities, than now: "
                f"set them back, or choose another name"
            )
        raise PromptError(f"{place}: is no completion of {prompt.place}: {self._remedy}")

    def _parse(self, number: int, line: bytes) -> Any:
        place = f"output file {self.path}, line {number}"
        try:
            return parse_json(line.decode(), place)
        except UnicodeDecodeError:
            raise PromptError(f"{place}: is not text: {self._remedy}") from None
