"""What a process is to measure, and what it says meanwhile.

Every library runs in a process of its own, which gets a `Task` as JSON and prints its rows (`benchmarks.printed_rows`);
a row that is said again holds more. Nothing here needs a library.
"""

import json
import sys
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.printed_rows import Row

OURS, FLA, JLA, RELEASE = "ours", "fla", "jla", "release"
MODULES = {rival: f"benchmarks.rivals.{rival}" for rival in (OURS, FLA, JLA, RELEASE)}

# gated_deltanet has the heads that its paper's code publishes: 3/8 N of them, with keys of 2 W / N channels and values
# of 4 W / N. Those of gated_deltanet_square have W / N channels in both, and there are N.
# Those that take the least compiling and tuning come first: a run that is cut short has most rows.
LAYERS = ("rat", "attention", "local_attention", "rnn", "linear_attention", "gated_deltanet_square", "gated_deltanet")
OFFERS = {
    OURS: LAYERS,
    FLA: tuple(layer for layer in LAYERS if layer != "rat"),
    JLA: tuple(layer for layer in LAYERS if layer not in ("rat", "rnn")),
    RELEASE: ("rat",),
}
# Models by library; "attention_1b" is the shape of configs/attention_1b.py in both.
MODELS = {OURS: ("attention_1b", "rat_1b"), FLA: (), JLA: ("attention_1b", "transformer-1p3b"), RELEASE: ()}
KEYS_SEEN = 1024  # by a token in local_attention, itself among them
PASSES = ("prefill", "train")  # in this order: prefill stands where train cannot run or the time ends
NOTE = "@ "  # begins the lines on the standard error that say what a process is at
NO_ROOM = "does not fit the memory of this device"


class Task(NamedTuple):
    """The sizes of all rows, and which rows."""

    width: int  # W
    heads: int  # N
    tokens: int  # of every row; the batch is tokens / T
    lengths: tuple[int, ...]  # T
    layers: tuple[str, ...]
    models: tuple[str, ...]
    repeats: int
    small: bool  # models that a CPU trains in seconds
    release: str | None  # a checkout of the PyTorch release

    @property
    def keys_seen(self) -> int:
        """By a token in local_attention, itself among them."""
        return min(KEYS_SEEN, max(2, min(self.lengths) // 4))

    def offered(self, rival: str) -> "Task":
        """The part of it that a library has."""
        return self._replace(
            layers=tuple(layer for layer in self.layers if layer in OFFERS[rival]),
            models=tuple(model for model in self.models if model in MODELS[rival]),
        )


def task_of_process() -> Task:
    """The task that this process was started with."""
    task = Task(**json.loads(sys.argv[1]))
    return task._replace(**{name: tuple(getattr(task, name)) for name in ("lengths", "layers", "models")})


def note(text: str) -> None:
    """Says on the standard error what this process is at."""
    print(f"{NOTE}{text}", file=sys.stderr, flush=True)


def reason(error: BaseException) -> str:
    """Why there is no row, in one line."""
    text = " ".join(str(error).split())
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return NO_ROOM
    return f"{type(error).__name__}: {text}"[:200]


def with_fewer(count: int, measure: Callable[[int], Row]) -> Row:
    """The row of the largest of count, count / 2, .. 1 that fits the memory."""
    row = measure(count)
    while row.get("error") == NO_ROOM and count > 1:
        count //= 2
        row = measure(count)
    return row
