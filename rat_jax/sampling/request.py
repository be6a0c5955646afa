"""What an engine is asked for, and what it tells of it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from rat_jax.sampling.errors import SamplingError, require

End = Literal["eos", "length", "stopped", "cancelled", "not_finite"]
"""Why a row ends: its end-of-document token, `max_new_tokens`, a callback that returned True, `Engine.cancel`, or
logits that are NaN or infinite (parameters that are damaged, or too large for their dtype)."""


class Event(NamedTuple):
    """New tokens of a row, or its end, or both."""

    request: int  # the number that `Engine.submit` returned
    sample: int  # counted from 0 in a request of several
    tokens: list[int]  # without the one that ends a document
    log_probs: list[float] | None  # of the tokens, if the request wants them
    end: End | None  # None: more will come


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt to continue."""

    prompt: Sequence[int] | np.ndarray  # ids in [0, V), at least one
    max_new_tokens: int  # the most tokens that a row gets
    min_new_tokens: int = 0  # so many at least: the end of a document cannot be chosen before
    num_samples: int = 1  # rows that continue the prompt, which is read once
    log_probs: bool = False  # tell log p of each token under the model's distribution, before temperature and penalty
    on_event: Callable[[Event], bool | None] | None = None  # told of each event; if it returns True that row ends
    copies_before: int | None = None
    """Equal prompts before this one, with which it shares no random numbers; None: those that the engine has had."""

    def check(self, vocab_size: int, capacity: int, row_bytes: int) -> np.ndarray:
        """The prompt's ids, int32.

        Raises:
          SamplingError: naming the field.
        """
        check_ids("the prompt", self.prompt, vocab_size)
        for name, least in (("max_new_tokens", 1), ("num_samples", 1), ("min_new_tokens", 0)):
            require(getattr(self, name) >= least, f"{name} must be {least} or more, got {getattr(self, name)}")
        require(
            self.min_new_tokens <= self.max_new_tokens,
            f"min_new_tokens {self.min_new_tokens} is above max_new_tokens {self.max_new_tokens}",
        )
        needed = len(self.prompt) + self.max_new_tokens - 1  # the last token is never read
        require(
            needed <= capacity,
            f"a prompt of {len(self.prompt):,} tokens with max_new_tokens {self.max_new_tokens:,} needs a capacity of "
            f"{needed:,} tokens a row, and the engine's is {capacity:,} ({row_bytes:,} bytes a row): shorten the "
            f"prompt, lower max_new_tokens, or raise capacity, which takes memory for every row",
        )
        return np.asarray(self.prompt, np.int32)


def check_ids(name: str, ids: Sequence[int] | np.ndarray, vocab_size: int) -> None:
    """Refuses a prompt that a model of this vocabulary cannot read.

    Raises:
      SamplingError: naming the prompt, position and id.
    """
    require(len(ids) > 0, f"{name} has no tokens: give at least one, such as the end of a document")
    array = np.asarray(ids)
    outside = (array < 0) | (array >= vocab_size)
    if outside.any():
        position = int(np.argmax(outside))
        raise SamplingError(
            f"{name}, position {position}: token id {ids[position]} is outside the vocabulary of {vocab_size}"
        )
