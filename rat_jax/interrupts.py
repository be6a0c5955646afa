"""Signals that ask a program to end: SIGTERM, as schedulers send before they take a machine away, and Ctrl-C.

What a signal does depends on what could be lost:

exit     ends the process at once, with a line and code 75. A thread does it, since the main thread may be in a long
         call (a compiler's), and an exception in the midst of one can get lost or leave a wreck
note     is noted, and the program looks at `requested` where it can save
raise    KeyboardInterrupt, as Python does for Ctrl-C: in library use, where the process is not ours to end, and in
         programs that give out what they have by then

Signals within a second count as one. The second changes nothing, and the third ends the process as it stands, in the
midst of a save too.
"""

import atexit
import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Literal

INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: schedulers can be told to start such a job again
NOTHING_LOST = "interrupted, and nothing is lost; the same command starts again"
Mode = Literal["exit", "note", "raise"]
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_ONE_REQUEST_SECS = 1.0  # signals so soon after one that counted are the same: wrappers pass on what the group got
_PATIENCE = 3  # requests


class Interrupts:
    """The signals of this process."""

    def __init__(self, mode: Literal["exit", "raise"]):
        self._mode: Mode = mode
        self._lock = threading.Lock()
        self._num_requests, self._last_secs = 0, float("-inf")

    def note(self) -> None:
        """From here on signals are noted."""
        with self._lock:
            self._mode = "note"

    def leave_at_once(self) -> None:
        """From here on signals end the process, unless they are noted."""
        with self._lock:
            if self._mode == "raise":
                self._mode = "exit"

    @property
    def requested(self) -> bool:
        """Whether this process got a signal."""
        return self._num_requests > 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        now = time.monotonic()
        if now - self._last_secs <= _ONE_REQUEST_SECS:
            return
        self._last_secs = now
        self._num_requests += 1
        if self._num_requests == _PATIENCE:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif self._mode == "note":
            write_line(f"{signal.Signals(number).name}: ending as soon as nothing is lost; a third signal ends at once")
        elif self._mode == "raise" and self._num_requests == 1:
            raise KeyboardInterrupt

    def watch(self, wakeup: int) -> None:
        """Does what "exit" means, in a thread.

        Args:
          wakeup: descriptor from which the number of every signal can be read, a byte.
        """
        while number := os.read(wakeup, 1):
            with self._lock:  # what is noted from here on is seen in time
                if self._mode == "exit" and number[0] in _SIGNALS:
                    _leave()


_of_program: Interrupts | None = None


@contextlib.contextmanager
def caught() -> Iterator[Interrupts]:
    """Signals are handled in this block: as the program does already (`of_program`), or beginning with "raise"."""
    if _of_program is not None:
        yield _of_program
        return
    interrupts, previous = Interrupts("raise"), {}
    if threading.current_thread() is threading.main_thread():  # Python hands signals to no other
        previous = {number: signal.signal(number, interrupts.handle) for number in _SIGNALS}
    try:
        yield interrupts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def exit_while_importing() -> None:
    """Signals end the process with a line and code 75 until `of_program`: for programs whose imports take seconds."""
    for number in _SIGNALS:
        signal.signal(number, lambda number, frame: _leave())


_last_acts: list[Callable[[], None]] = []


@contextlib.contextmanager
def before_exit(act: Callable[[], None]) -> Iterator[None]:
    """What is done if a signal ends the process within this block, in a thread; errors of the system are ignored."""
    _last_acts.append(act)
    try:
        yield
    finally:
        _last_acts.remove(act)


def do_last_acts() -> None:
    """Does what `before_exit` was given, for whatever ends the process in a thread."""
    for act in reversed(_last_acts):
        with contextlib.suppress(OSError):
            act()


def _leave() -> None:
    write_line(NOTHING_LOST)
    do_last_acts()
    os._exit(INTERRUPTED)


@contextlib.contextmanager
def of_program(mode: Literal["exit", "raise"] = "exit") -> Iterator[None]:
    """The block is all that this process does: signals are handled in it, beginning with `mode`.

    After it they are ignored as soon as Python tidies up, where it would forget its handlers; after a signal they are
    noted until then.
    """
    global _of_program
    _of_program = interrupts = Interrupts(mode)
    wakeup, end = os.pipe()
    os.set_blocking(end, False)
    threading.Thread(target=interrupts.watch, args=(wakeup,), name="signals", daemon=True).start()
    previous = {number: signal.signal(number, interrupts.handle) for number in _SIGNALS}
    descriptor = signal.set_wakeup_fd(end, warn_on_full_buffer=False)
    try:
        yield
    finally:
        interrupts.note()
        _of_program = None
        if not interrupts.requested:
            signal.set_wakeup_fd(descriptor)
            os.close(end)  # which ends the thread
            for number, handler in previous.items():
                signal.signal(number, handler)
        atexit.register(_ignore)


def _ignore() -> None:
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def write_line(line: str) -> None:
    """To standard error, whatever is being written there: files of Python refuse to be entered twice."""
    os.write(2, f"\n{line}\n".encode())
