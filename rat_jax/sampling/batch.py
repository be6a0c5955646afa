"""Many prompts continued in memory that does not depend on their number."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from rat_jax.data.tokenizer import Tokenizer
from rat_jax.memory import gib
from rat_jax.model import LanguageModel
from rat_jax.program_store import ProgramStore
from rat_jax.sampling.completions import Completion
from rat_jax.sampling.engine import Engine
from rat_jax.sampling.errors import not_finite
from rat_jax.sampling.generation import make_engine
from rat_jax.sampling.prompts import Prompt, PromptError, encode_prompt
from rat_jax.sampling.request import Event, Request
from rat_jax.sampling.submitted import prompt_digest
from rat_jax.sampling.text_settings import TextSettings


class Rows(Protocol):
    """Which texts there are: an `OutputFile`, or a `Printer`."""

    def is_done(self, row: int) -> bool: ...
    def skip(self, row: int) -> None: ...


class Sink(Protocol):
    """Where texts go: a `Printer`, or a `FileWriter`."""

    @property
    def has_room(self) -> bool: ...
    def is_done(self, row: int) -> bool: ...
    def grow(self, completion: Completion) -> None: ...
    def finish(self, completion: Completion) -> None: ...


@dataclasses.dataclass
class Survey:
    """What a first pass over prompts finds of those that have texts left to make."""

    num_prompts: int = 0
    num_rows: int = 0  # texts
    num_refused: int = 0
    lengths: set[int] = dataclasses.field(default_factory=set)  # of prompts, in tokens


class Batch:
    """Prompts that a model continues. They are read twice, one by one: to find the longest, and to continue them."""

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        prompts: Iterable[Prompt | PromptError],
        settings: TextSettings,
        *,
        batch_size: int,
        max_prompt_tokens: int | None,
        store: ProgramStore | None = None,
    ):
        """Takes what it needs.

        Args:
          model: what predicts.
          tokenizer: the model's.
          prompts: the same at each pass; in place of those that were refused before their errors.
          settings: of texts.
          batch_size: texts that are made at a time.
          max_prompt_tokens: longer prompts are refused. None: the longest prompt decides what a row's cache takes.
          store: of the model's compiled programs.
        """
        self._model, self._tokenizer, self._prompts, self._settings = model, tokenizer, prompts, settings
        self._batch_size, self._max_prompt_tokens, self._store = batch_size, max_prompt_tokens, store

    def survey(self, rows: Rows, refuse: Callable[[PromptError], None], advance: Callable[[], None]) -> Survey:
        """Reads all prompts.

        Args:
          rows: knows which texts are there, and is told which there will not be.
          refuse: told of each prompt that is refused here, for its length or by the tokenizer.
          advance: called after each prompt.
        """
        found, num_samples = Survey(), self._settings.num_samples
        for first_row, prompt in self._rows():
            advance()
            of_prompt = range(first_row, first_row + num_samples)
            num_left = sum(not rows.is_done(row) for row in of_prompt)
            if num_left == 0:
                continue
            try:
                ids = self._encode(prompt)
            except PromptError as error:
                found.num_refused += 1
                refuse(error)
                for row in of_prompt:
                    rows.skip(row)
                continue
            found.num_prompts += 1
            found.num_rows += num_left
            found.lengths.add(len(ids))
        return found

    def engine(self, survey: Survey) -> Engine:
        """The engine that fits what a pass has found; errors as of `make_engine`."""
        longest, lengths = max(survey.lengths), sorted(survey.lengths)
        num_more = min(self._batch_size, survey.num_prompts) - len(lengths)
        return make_engine(
            self._model,
            num_rows=survey.num_rows,
            lengths=[*lengths, *[longest] * max(0, num_more)],
            max_new_tokens=self._settings.max_new_tokens,
            batch_size=self._batch_size,
            rule=self._settings.rule,
            eos_id=self._tokenizer.eos_id,
            seed=self._settings.seed,
            store=self._store,
        )

    def run(self, engine: Engine, sink: Sink, count_tokens: Callable[[int], None]) -> None:
        """Makes all texts that are left.

        Raises:
          SamplingError: if the prompts are others than those of the pass before.
          SamplingStopped: logits that are not finite, or a device that runs out of memory.
          RunStopped: if the sink cannot write.
        """
        for event in engine.serve(self._requests(sink)):
            count_tokens(len(event.tokens))

    def _rows(self) -> Iterator[tuple[int, Prompt]]:
        """The prompts that can be read, each with its first row: prompts are counted with those that cannot."""
        for number, prompt in enumerate(self._prompts):
            if not isinstance(prompt, PromptError):
                yield number * self._settings.num_samples, prompt

    def _encode(self, prompt: Prompt) -> list[int]:
        """The ids.

        Raises:
          PromptError: if the tokenizer refuses it, or it is too long.
        """
        ids = encode_prompt(prompt, self._tokenizer)
        if self._max_prompt_tokens is not None and len(ids) > self._max_prompt_tokens:
            needed = self._model.cache_bytes(1, len(ids) + self._settings.max_new_tokens - 1)
            allowed = self._model.cache_bytes(1, self._max_prompt_tokens + self._settings.max_new_tokens - 1)
            raise PromptError(
                f"{prompt.place}: has {len(ids):,} tokens, more than max_prompt_tokens {self._max_prompt_tokens:,}: "
                f"shorten it, or raise that; the cache of each text, {gib(allowed)} with prompts of the limit, would "
                f"take {gib(needed)}"
            )
        return ids

    def _requests(self, sink: Sink) -> Iterator[Request | None]:
        """A request for each run of samples of a prompt that are left; None while the sink has no room."""
        copies: Counter[int] = Counter()
        for first_row, prompt in self._rows():
            samples = [sample for sample in range(self._settings.num_samples) if not sink.is_done(first_row + sample)]
            if not samples and self._settings.temperature == 0:
                continue  # without random numbers, equal prompts before one do not matter
            try:
                ids = self._encode(prompt)
            except PromptError:  # told in the pass before
                continue
            digest = prompt_digest(ids)
            for first, count in _runs(samples):
                while not sink.has_room:
                    yield None
                yield self._request(prompt, ids, sink, first_row, first, count, copies[digest])
            copies[digest] += self._settings.num_samples

    def _request(
        self, prompt: Prompt, ids: list[int], sink: Sink, first_row: int, first: int, count: int, copies: int
    ) -> Request:
        settings, completions = self._settings, {}

        def hear(event: Event) -> bool:
            sample = first + event.sample
            if sample not in completions:
                completions[sample] = Completion(
                    first_row + sample, sample, prompt, ids, self._tokenizer, settings.stop
                )
            completion = completions[sample]
            completion.add(event.tokens, event.log_probs, event.end is not None)
            if event.end == "not_finite":
                raise not_finite(prompt.place, len(completion.tokens))
            if event.end is None:
                sink.grow(completion)
                return completion.is_stopped
            del completions[sample]
            sink.finish(completion)
            return False

        return Request(
            ids,
            settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            num_samples=count,
            log_probs=settings.log_probs,
            on_event=hear,
            copies_before=copies + first,
        )


def _runs(samples: list[int]) -> Iterator[tuple[int, int]]:
    """The first of each run of neighbours, and how many it has."""
    for index, sample in enumerate(samples):
        if index == 0 or samples[index - 1] != sample - 1:
            count = next((i for i in range(index + 1, len(samples)) if samples[i] != samples[i - 1] + 1), len(samples))
            yield sample, count - index
