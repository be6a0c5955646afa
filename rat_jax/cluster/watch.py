"""The watch of processes over each other: one that is lost ends the others within a settable time.

Every process has a thread that sends signs of life over its links, with the step that its main thread has reached. The
first process finds the others, and itself, lost

  when a connection is closed, as the system does at once for a process that dies,
  when no sign of life comes, as of a process that is stopped or a machine that lost its power,
  when one stays at a step while others wait at a later one, unless it compiles;

and tells all. Each then says so on standard error and ends with code 76. The others watch over the first alone. What
all processes wait for together, a device or a file server, is not seen.
"""

import contextlib
import ctypes
import dataclasses
import os
import selectors
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator

from rat_jax.cluster.link import Link, LinkError, Message
from rat_jax.interrupts import INTERRUPTED, before_exit, do_last_acts, write_line
from rat_jax.program import FAILED, LOST

LEAST_SECS = 5.0  # of `lost_after_secs`
_LONGEST_BEAT_SECS = 5.0
_LOOK_SECS = 0.2
_GRACE_SECS = 5.0  # for others to end by themselves when one has failed: mostly all find the same fault
_END_SECS = 300.0  # that a process which has ended well waits for the others
_FAREWELL_SECS = 1.0  # for others to read the first one's last words
_VERDICT_SECS = 2.0  # after a failure, which may be that of a connection to a lost process


@dataclasses.dataclass
class _Peer:
    """What is known of another process."""

    number: int
    link: Link
    heard_secs: float  # when, by `time.monotonic`
    step: int | None = None  # that it has reached; None: not to be judged
    ended: bool = False


class Watch:
    """The part that this process has in the watch."""

    def __init__(self, links: dict[int, Link], process_id: int, lost_after_secs: float):
        """Starts the thread.

        Args:
          links: of `rat_jax.cluster.meeting.meet`.
          process_id: of this process.
          lost_after_secs: in which all are to know.
        """
        self.step: int | None = None  # that the main thread has reached; None: it is not to be judged
        self._process_id = process_id
        now = time.monotonic()
        self._peers = {number: _Peer(number, link, now) for number, link in links.items()}
        self._beat_secs = min(_LONGEST_BEAT_SECS, lost_after_secs / 10)
        self._silent_secs = lost_after_secs - 2 * self._beat_secs  # what is left is the way of the news
        self._behind: dict[int, tuple[int, float]] = {}  # processes that others wait for: their step, since when
        self._failure: tuple[str, float] | None = None  # of another process: what to say, and when to end for it
        self._leaving = self._ending = False
        self._all_ended = threading.Event()
        self._stopped = threading.Event()
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(before_exit(self._tell_interrupted))
        self._stack.enter_context(_delay_aborts())
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def leave(self, code: int) -> None:
        """Waits until all other processes have ended, too, or some seconds if this one has failed."""
        failed = code not in (0, INTERRUPTED)
        self.step, self._leaving = None, True
        self._tell_end(code, failed=failed)
        self._all_ended.wait(_GRACE_SECS if failed else _END_SECS)
        self._stopped.set()
        self._thread.join()
        self._stack.close()
        if self._is_first:
            self._send_all({"over": True})
            self._read_all(_FAREWELL_SECS)  # JAX's agents abort processes that the first one leaves behind
        for peer in self._peers.values():
            peer.link.close()

    @property
    def _is_first(self) -> bool:
        return self._process_id == 0

    def _run(self) -> None:
        looked_secs, beat_secs = time.monotonic(), 0.0
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                selector.register(peer.link, selectors.EVENT_READ, peer)
            while not self._stopped.is_set():
                ready = selector.select(min(_LOOK_SECS, self._beat_secs))
                now = time.monotonic()
                if now - looked_secs > self._silent_secs / 2:  # it is this process that was stopped
                    self._behind.clear()
                    for peer in self._peers.values():
                        peer.heard_secs = now
                looked_secs = now
                for key, _ in ready:
                    if not self._hear(key.data, now):
                        selector.unregister(key.fileobj)
                if now - beat_secs >= self._beat_secs:
                    beat_secs = now
                    self._send_all({"beat": self.step})
                self._judge(now)

    def _hear(self, peer: _Peer, now: float) -> bool:
        """Takes what a process says; whether its connection lasts."""
        try:
            messages = peer.link.receive()
        except LinkError as error:
            if self._failure is not None and not self._is_first and not self._leaving:
                self._end(self._failure[0])  # it was the first process that failed
            if not peer.ended and not (self._leaving and not self._is_first):
                self._lose(peer.number, str(error))
            peer.ended = True
            self._look_for_end()
            return False
        peer.heard_secs = now
        for message in messages:
            match message:
                case {"beat": step}:
                    peer.step = step
                case {"lost": text}:
                    self._end(text)
                case {"over": True}:
                    peer.ended = True
                case {"ended": code, "failed": failed}:
                    peer.step, peer.ended = None, self._is_first
                    if failed:
                        self._note_failure(f"process {peer.number} has ended with code {code}, see what it says", now)
                case {"failure": text}:
                    self._note_failure(text, now)
        self._look_for_end()
        return True

    def _judge(self, now: float) -> None:
        if self._failure is not None and now >= self._failure[1] and not self._leaving:
            self._end(self._failure[0])
        for peer in self._peers.values():
            if not peer.ended and now - peer.heard_secs > self._silent_secs:
                self._lose(peer.number, f"it gave no sign of life for {now - peer.heard_secs:.0f} s")
        if self._is_first:
            self._judge_steps(now)

    def _judge_steps(self, now: float) -> None:
        steps = {0: self.step} | {peer.number: peer.step for peer in self._peers.values() if not peer.ended}
        steps = {number: step for number, step in steps.items() if step is not None}
        last = max(steps.values(), default=0)
        self._behind = {
            number: self._behind[number] if self._behind.get(number, (-1,))[0] == step else (step, now)
            for number, step in steps.items()
            if step < last
        }
        for number, (step, since) in self._behind.items():
            if now - since > self._silent_secs:
                self._lose(number, f"it is stuck after step {step} for {now - since:.0f} s, while others wait for it")

    def _lose(self, number: int, reason: str) -> None:
        text = f"process {number} is lost: {reason}"
        if self._is_first:
            self._send_all({"lost": text})
            self._read_all(_FAREWELL_SECS)
        self._end(text)

    def _read_all(self, within_secs: float) -> None:
        """Reads what others still send until they close: where it is not read, what was sent to them can be lost."""
        until = time.monotonic() + within_secs
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                with contextlib.suppress(ValueError):  # it is closed
                    selector.register(peer.link, selectors.EVENT_READ)
            while selector.get_map() and (left := until - time.monotonic()) > 0:
                for key, _ in selector.select(left):
                    try:
                        key.fileobj.receive()
                    except LinkError:
                        selector.unregister(key.fileobj)

    def _note_failure(self, text: str, now: float) -> None:
        if self._failure is None:
            self._failure = (text, now + _GRACE_SECS)
            if self._is_first:
                self._send_all({"failure": text})

    def _tell_end(self, code: int, *, failed: bool) -> None:
        if self._is_first:
            if failed:
                self._send_all({"failure": f"process 0 has ended with code {code}, see what it says"})
        else:
            self._send_all({"ended": code, "failed": failed})

    def _tell_interrupted(self) -> None:
        """Of a signal that ends this process alone, before there is something to save."""
        if not self._ending:
            self._tell_end(INTERRUPTED, failed=True)

    def _look_for_end(self) -> None:
        if all(peer.ended for peer in self._peers.values()):
            self._all_ended.set()

    def _send_all(self, message: Message) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(LinkError):  # to be seen when it is read
                peer.link.send(message)

    def _end(self, text: str) -> None:
        """Ends this process: its main thread waits for the others, most likely in the midst of a collective."""
        write_line(f"error: {text}; this process ends as well. What was saved is good, and the same command resumes")
        self._ending = True
        do_last_acts()
        os._exit(LOST)


@contextlib.contextmanager
def _delay_aborts() -> Iterator[None]:
    """Within the block an abort waits for some seconds, in which the watch ends the process in its own words.

    JAX's agent aborts a process a tenth of a second after process 0 has died; a function of the system as the handler,
    `sleep`, whose argument is then the signal's number, needs nothing of Python in a thread that is about to abort.
    """
    system = ctypes.CDLL(None)
    system.signal.argtypes, system.signal.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_void_p
    before = system.signal(signal.SIGABRT, ctypes.cast(system.sleep, ctypes.c_void_p))
    try:
        yield
    finally:
        system.signal(signal.SIGABRT, before)


_of_process: Watch | None = None


def start_watch(links: dict[int, Link], process_id: int, lost_after_secs: float) -> None:
    """Starts the watch of this process, which ends with `leave`."""
    global _of_process
    _of_process = Watch(links, process_id, lost_after_secs)


def reached(step: int) -> None:
    """Says that the main thread has done so many steps; nothing where there is no watch."""
    if _of_process is not None:
        _of_process.step = step


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Within the block this process does what takes others less time, as compiling; it is not stuck."""
    watch = _of_process
    if watch is None:
        yield
        return
    before, watch.step = watch.step, None
    try:
        yield
    finally:
        watch.step = before


def leave(code: int) -> None:
    """Ends the watch, as the last thing that a program does, and where it failed the process: others do not wait.

    JAX would wait for all processes to end well. A program that fails for want of another process, as in a save that
    all make together, may come here before the watch has seen that one's connection closed, which then decides.

    Args:
      code: with which the program ends.
    """
    global _of_process
    if _of_process is None:
        return
    if code == FAILED:
        time.sleep(_VERDICT_SECS)
    if (error := sys.exception()) is not None:
        traceback.print_exception(error)
    _of_process.leave(code)
    _of_process = None
    if code not in (0, INTERRUPTED):
        sys.stdout.flush()
        os._exit(code)
