"""Requests that an engine has taken, and their rows."""

import dataclasses
import zlib
from collections.abc import Sequence

import numpy as np

from rat_jax.sampling.request import Request


@dataclasses.dataclass(eq=False)
class Submitted:
    """A request that an engine has taken, and its rows that have not ended."""

    number: int
    request: Request
    prompt: np.ndarray  # int32
    digest: int
    copy: int  # equal prompts before it
    rows: "dict[int, Row]" = dataclasses.field(default_factory=dict)  # in slots, by sample
    num_started: int = 0  # samples that got a slot


@dataclasses.dataclass(eq=False)
class Row:
    """One sample of a request, from its slot on."""

    submitted: Submitted
    sample: int
    slot: int
    num_tokens: int = 0  # handed out
    is_open: bool = True


def prompt_digest(prompt: Sequence[int] | np.ndarray) -> int:
    """What a prompt adds to the seed of its random numbers, in [0, 2**32)."""
    return zlib.crc32(np.asarray(prompt, "<u4").tobytes())
