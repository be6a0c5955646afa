"""What the time of a training run goes to."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

Activity = Literal["compiling", "data", "saving", "validating", "evaluating"]
STEPS = "steps"  # all other time: the host waits for the device, which computes them


class TimeShares:
    """Seconds of the thread that runs the loop, by what it does; those of steps are what remains.

    `data` is the host's waiting for batches. The device computes the step before meanwhile, so that what is lost is at
    most that. Arrays are saved in the background: `saving` is what the loop waits for.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._activities: list[str] = [STEPS]
        self._since = clock()
        self._recent: Counter[str] = Counter()
        self._whole: Counter[str] = Counter()

    @contextlib.contextmanager
    def spent_on(self, activity: Activity) -> Iterator[None]:
        """The time of this block, less that of such blocks inside it."""
        self._charge()
        self._activities.append(activity)
        try:
            yield
        finally:
            self._charge()
            self._activities.pop()

    def take(self) -> dict[str, float]:
        """Shares of the time since the last call, which sum up to 1."""
        self._charge()
        recent, self._recent = self._recent, Counter()
        return _shares(recent)

    def summary(self) -> str:
        """In one line, of all the time, the largest share first."""
        self._charge()
        shares = sorted(_shares(self._whole).items(), key=lambda item: -item[1])
        return ", ".join(f"{activity} {share:.1%}" for activity, share in shares if share >= 5e-4)

    def _charge(self) -> None:
        now = self._clock()
        for secs in (self._recent, self._whole):
            secs[self._activities[-1]] += now - self._since
        self._since = now


def _shares(secs: Counter[str]) -> dict[str, float]:
    whole = sum(secs.values())
    return {activity: secs[activity] / whole for activity in secs} if whole > 0 else {}
