"""Signals that ask a run to end: SIGTERM, as schedulers send before they take a machine away, and Ctrl-C."""

import os
import signal
import threading
import time
from types import FrameType

import jax
import numpy as np
from jax.experimental import multihost_utils

PREEMPTED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: schedulers can be told to start such a job again
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_REQUEST_SECS = 1.0  # signals so soon after one that counted are the same: wrappers pass on what the group got
_PATIENCE = 3  # requests: the last ends the process as it stands


class Preemption:
    """Within the block a signal raises KeyboardInterrupt, once; after `hold` it is noted, so that a step can be saved.

    Signals within a second of each other count as one. The second changes nothing, and the third ends the process at
    once, in the midst of a save too.
    """

    def __init__(self):
        self._num_requests, self._last_secs = 0, float("-inf")
        self._is_holding = False
        self._previous = {}

    def __enter__(self) -> "Preemption":
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def hold(self) -> None:
        """From here on a step could be lost: signals are noted, and `agreed` tells."""
        self._is_holding = True

    @property
    def requested(self) -> bool:
        """Whether this process got a signal."""
        return self._num_requests > 0

    def agreed(self, step: int, every_steps: int) -> bool:
        """Whether to end after `step`: as soon as requested; with other hosts at a multiple of `every_steps`.

        All hosts get the same answer for the same step.
        """
        if jax.process_count() == 1:
            return self.requested
        if step % every_steps:
            return False
        return bool(multihost_utils.process_allgather(np.asarray(self.requested)).any())

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last_secs <= _ONE_REQUEST_SECS:
            return
        self._last_secs = now
        self._num_requests += 1
        name = signal.Signals(number).name
        if self._num_requests == 1 and not self._is_holding:
            raise KeyboardInterrupt
        if self._num_requests < _PATIENCE:
            # A handler may have come between two halves of another message: files of Python refuse to be entered twice.
            os.write(2, f"\n{name}: ending once this step is saved; the {_PATIENCE}rd signal ends at once\n".encode())
            return
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
