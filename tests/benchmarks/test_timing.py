"""Times of steps that are asked for ahead, on a clock that only they move."""

import pytest

from benchmarks import timing


class Machine:
    """A host that takes some time to ask for a step, and a device that takes some to make it."""

    def __init__(self, of_host: float, of_device: float):
        self.of_host, self.of_device = of_host, of_device
        self.now = self.device_free = 0.0
        self.steps = 0

    def step(self, carried: int) -> tuple[int, float]:
        """The number of steps so far, and when the device has ended this one."""
        self.now += self.of_host
        self.device_free = max(self.device_free, self.now) + self.of_device
        self.steps += 1
        return carried + 1, self.device_free

    def wait(self, end: float) -> None:
        self.now = max(self.now, end)


@pytest.mark.parametrize(("of_host", "of_device"), [(1.0, 16.0), (16.0, 1.0), (15.0, 16.0), (16.0, 15.0), (0.0, 4.0)])
def test_a_step_takes_as_long_as_the_slower_of_host_and_device(of_host, of_device, monkeypatch):
    machine = Machine(of_host, of_device)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: machine.now)
    seconds, carried = timing.time_steps(machine.step, 0, 3, machine.wait)
    assert seconds == [max(of_host, of_device)] * 3
    assert carried == machine.steps == 5
