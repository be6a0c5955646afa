"""What signals do, by what could be lost."""

import os
import signal
import threading

import pytest

from rat_jax import interrupts
from rat_jax.interrupts import Interrupts


@pytest.fixture
def clock(monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(interrupts.time, "monotonic", lambda: seconds[0])
    return seconds


@pytest.fixture
def ends(monkeypatch):
    """What would have ended the process."""
    found = []
    monkeypatch.setattr(interrupts.os, "kill", lambda pid, number: found.append((pid, number)))
    monkeypatch.setattr(interrupts.os, "_exit", lambda code: found.append(code))
    return found


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_noted_up_to_the_third(clock, ends, handlers, capfd):
    noted = Interrupts("raise")
    noted.note()
    assert not noted.requested
    for seconds in (0.0, 0.05, 1.0):  # one request: wrappers pass signals on
        clock[0] = 100 + seconds
        noted.handle(signal.SIGTERM, None)
    assert noted.requested
    clock[0] = 102
    noted.handle(signal.SIGINT, None)
    assert ends == []
    assert capfd.readouterr().err.count("a third signal ends at once") == 2
    clock[0] = 104
    noted.handle(signal.SIGINT, None)
    assert ends == [(os.getpid(), signal.SIGINT)]
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL


def test_one_keyboard_interrupt_for_several_signals(clock):
    raising = Interrupts("raise")
    with pytest.raises(KeyboardInterrupt):
        raising.handle(signal.SIGTERM, None)
    for seconds in (0.5, 5.0):  # what the first began to end goes on
        clock[0] = 100 + seconds
        raising.handle(signal.SIGTERM, None)


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), interrupts.caught():
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_in_another_thread_nothing_is_handled():
    found = []

    def look():
        with interrupts.caught() as caught:
            found.append((signal.getsignal(signal.SIGTERM), caught.requested))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(signal.getsignal(signal.SIGTERM), False)]


@pytest.mark.parametrize("noting", [False, True])
def test_a_program_that_has_done_nothing_ends_at_once(ends, capfd, noting):
    program = Interrupts("exit")
    if noting:
        program.note()
    wakeup, end = os.pipe()
    os.write(end, bytes([signal.SIGTERM]))
    os.close(end)
    program.watch(wakeup)
    os.close(wakeup)
    assert ends == ([] if noting else [interrupts.INTERRUPTED])
    assert (interrupts.NOTHING_LOST in capfd.readouterr().err) != noting


def test_one_of_several_processes_ends_at_once(ends):
    """An exception would leave the others waiting for it; what notes signals goes on noting them."""
    program = Interrupts("raise")
    program.leave_at_once()
    program.handle(signal.SIGTERM, None)  # raises nothing
    for expected in ([interrupts.INTERRUPTED], []):
        wakeup, end = os.pipe()
        os.write(end, bytes([signal.SIGTERM]))
        os.close(end)
        program.watch(wakeup)
        os.close(wakeup)
        assert ends == expected
        ends.clear()
        program.note()
        program.leave_at_once()


def test_the_code_is_the_documented_one():
    assert interrupts.INTERRUPTED == os.EX_TEMPFAIL


def test_a_program_leaves_handlers_as_they_were(monkeypatch):
    monkeypatch.setattr(interrupts.atexit, "register", lambda function: None)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    descriptor = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(descriptor)
    with interrupts.of_program(), interrupts.caught() as caught:
        assert signal.getsignal(signal.SIGTERM) == caught.handle
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    assert signal.set_wakeup_fd(descriptor) == descriptor
    with interrupts.caught() as own:
        assert own is not caught
