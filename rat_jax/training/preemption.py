"""Signals that ask a run to end: SIGTERM, as schedulers send before they take a machine away, and Ctrl-C."""

import signal
import threading
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: schedulers can be told to start such a job again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preemption:
    """Within the block, the first signal is noted and the second acts as it did before."""

    def __init__(self):
        self._requested = False
        self._previous = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        self._restore()

    @property
    def requested(self) -> bool:
        """Whether this process got a signal."""
        return self._requested

    def agreed(self, step: int, every_steps: int) -> bool:
        """Whether to end after `step`: as soon as requested; with other hosts at a multiple of `every_steps`.

        All hosts get the same answer for the same step.
        """
        if jax.process_count() == 1:
            return self._requested
        if step % every_steps:
            return False
        return bool(multihost_utils.process_allgather(np.asarray(self._requested)).any())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
