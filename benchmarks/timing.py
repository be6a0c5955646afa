"""Times of work that a device does after the host has asked for it."""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

ENOUGH_MS = 120  # of calls timed together: the host's part of each is then hidden behind the device's work


class Times(NamedTuple):
    """Milliseconds of one call, over the repeats."""

    ms: float  # median
    spread_ms: float  # slowest minus fastest


def time_calls(call: Callable[[], Any], wait: Callable[[Any], Any], repeats: int) -> Times:
    """Median over `repeats` of the mean of calls queued one behind the other.

    Args:
      call: starts the work and returns its result without waiting.
      wait: returns once a result is there.
      repeats: how often to measure; a call that takes longer than ten times ENOUGH_MS is measured once.
    """
    wait(call())  # whatever happens only once
    start = time.perf_counter()
    wait(call())
    first_ms = 1e3 * (time.perf_counter() - start)
    if first_ms > 10 * ENOUGH_MS:
        return Times(first_ms, 0.0)
    calls = max(1, min(200, round(ENOUGH_MS / first_ms)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = call()
        wait(result)
        times.append(1e3 * (time.perf_counter() - start) / calls)
    return Times(statistics.median(times), max(times) - min(times))


def time_once(call: Callable[..., Any], arguments: tuple[Any, ...], wait: Callable[[Any], Any]) -> tuple[float, Any]:
    """Seconds of one call with these arguments, which it may consume, and its result."""
    start = time.perf_counter()
    result = wait(call(*arguments))
    return time.perf_counter() - start, result


def time_steps(
    step: Callable[[Any], tuple[Any, Any]], carried: Any, steps: int, wait: Callable[[Any], Any]
) -> tuple[list[float], Any]:
    """Seconds from the end of a step to that of the next, and what the last one carries on.

    Each step is asked for before the one before it has ended, as in a training loop: the host's part of it is hidden
    where it is the shorter one. Where it is not, the host hears of each end late, but for that of a step that none
    follows, which is therefore not counted.

    Args:
      step: takes what is carried and returns it anew, and what is there once the step has ended.
      carried: by the first step.
      steps: how many seconds are wanted; two steps more are made, one before and one behind them.
      wait: returns once what a step gave is there.
    """
    ends, given = [], None
    for index in range(steps + 2):
        before, (carried, given) = given, step(carried)
        if index > 0:
            wait(before)
            ends.append(time.perf_counter())
    wait(given)
    return [later - earlier for earlier, later in itertools.pairwise(ends)], carried
