"""A machine that runs the warpgroups of programs one at a time, in an order that is drawn.

Before each of its operations a warpgroup lets the machine draw who goes on: a warpgroup that waits for nothing, itself
perhaps, or one of the copies and products that are under way. The weights of the draw change now and then, so that each
of them is at times far ahead of the others and at times far behind.

What is ordered before what, whatever the draw, is known from vector clocks: of every agent, which is a warpgroup or an
asynchronous operation, a clock has the last moment that is ordered before it.
"""

import collections
import random
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import pallas_kernels

KERNELS = (str(Path(pallas_kernels.__file__).parent), str(Path(__file__).with_name("mosaic_gpu")))
REDRAWN = 150  # draws with the same weights
WRITTEN = 2  # the moment of a copy to global memory that ends it
_thread = threading.local()


class Fault(Exception):
    """What a kernel may not do; says which line of it did."""


class _Stopped(BaseException):
    """Ends a warpgroup's thread after the fault of another one."""


def place() -> str:
    """The lines of kernels that are being run, the innermost first."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < 4:
        code = frame.f_code
        if code.co_filename.startswith(KERNELS):
            found.append(f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})")
        frame = frame.f_back
    return " < ".join(found)


def running() -> "Warpgroup | None":
    """The warpgroup whose thread this is; None outside kernels."""
    return getattr(_thread, "warpgroup", None)


def fault(text: str, operation: "Operation | None" = None) -> Fault:
    """Of an asynchronous operation, or of the warpgroup that is running."""
    return Fault(f"{text}: {operation or f'{running()} at {place()}'}")


class Clock(dict):
    """The last moment of every agent that is known to be over."""

    def join(self, other: "Clock") -> None:
        for agent, moment in other.items():
            if moment > self.get(agent, 0):
                self[agent] = moment


class Operation:
    """A copy or product of a warpgroup, whose steps are taken some time after it has been issued.

    Its clock is that of its warpgroup when it was issued, and its only moment is 1; a copy to global memory, which then
    has read its source, has a second one, when it has written.
    """

    def __init__(self, kind: str, warpgroup: "Warpgroup"):
        self.kind, self.warpgroup, self.place = kind, warpgroup, place()
        self.steps: collections.deque[Callable[[], None]] = collections.deque()
        self.clock = Clock(warpgroup.clock)
        self.clock[self] = 1
        warpgroup.tick()

    def __str__(self) -> str:
        return f"{self.kind} of {self.warpgroup} from {self.place}"


class Warpgroup:
    """One thread of a program.

    Attributes:
      axes: its index along every named axis.
      clock: what is ordered before its next operation.
      products: those it has not waited for, in order of issue, in which they are also computed.
      stores: copies to global memory that it has not waited for, in order of issue.
      read_stores: those of which it knows that they have read their source.
      uncommitted: memory to which it has stored what copies and products need not see yet.
      calls: of `get_global` so far.
    """

    def __init__(self, machine: "Machine", index: int, axes: dict[str, int]):
        self.machine, self.index, self.axes = machine, index, axes
        self.clock = Clock({self: 1})
        self.products: list[Operation] = []
        self.stores: list[Operation] = []
        self.read_stores: set[Operation] = set()
        self.uncommitted: set[Any] = set()
        self.calls = 0
        self.turn, self.finished = threading.Event(), False
        self.ready: Callable[[], bool] | None = None
        self.place, self.what = "", str

    def __str__(self) -> str:
        return f"warpgroup {self.index} ({', '.join(f'{name} {i}' for name, i in self.axes.items())})"

    def tick(self) -> None:
        self.clock[self] += 1

    def step(self, ready: Callable[[], bool] | None = None, what: Callable[[], str] = str) -> None:
        """Lets others go on before the next operation, which may come once `ready`, if given, is true of `what`."""
        self.ready, self.what = ready, what
        if ready is not None:
            self.place = place()
        self.machine.draw_until(self)
        self.ready = None

    def state(self) -> str:
        return f"{self} has ended" if self.finished else f"{self} waits for {self.what()} at {self.place}"

    def wait_for_products(self, left: int) -> None:
        """Until at most `left` products are under way."""
        done = self.products[: max(len(self.products) - left, 0)]
        self.step(lambda: not any(product.steps for product in done), lambda: "products")
        for product in done:
            self.clock.join(product.clock)
        del self.products[: len(done)]

    def wait_for_stores(self, left: int, *, read_only: bool) -> None:
        """Until all but the last `left` copies to global memory are done, or have at least read their sources."""
        done = self.stores[: max(len(self.stores) - left, 0)]
        steps_left = 1 if read_only else 0
        self.step(lambda: all(len(store.steps) <= steps_left for store in done), lambda: "copies to global memory")
        for store in done:
            self.clock.join(store.clock)
        if read_only:
            self.read_stores.update(done)
        else:
            self.clock.update(dict.fromkeys(done, WRITTEN))
            del self.stores[: len(done)]


class Machine:
    """The warpgroups of the programs that run together: one, a cluster, or the whole grid.

    Attributes:
      loads: copies from global memory that are under way.
      loaded: those that are done.
      semaphores: those of the grid, of each call of `get_global` in turn; None where some of its programs are missing.
    """

    def __init__(self, draws: random.Random, axes: list[dict[str, int]], *, whole_grid: bool):
        self.draws = draws
        self.semaphores: list[Any] | None = [] if whole_grid else None
        self.warpgroups = [Warpgroup(self, index, of_group) for index, of_group in enumerate(axes)]
        self.loads: list[Operation] = []
        self.loaded: list[Operation] = []
        self.error: BaseException | None = None
        self.count = 0
        self.weights: dict[Warpgroup | str, float] = {}

    def run(self, body: Callable[[], None]) -> None:
        """Runs the body in every warpgroup; raises what the first of them raises that fails."""
        threads = [threading.Thread(target=self._thread, args=(group, body), daemon=True) for group in self.warpgroups]
        for thread in threads:
            thread.start()
        self.draws.choice(self.warpgroups).turn.set()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error
        for load in self.loaded:
            if not any(load in group.clock for group in self.warpgroups):
                raise Fault(f"nothing waited for the {load}")

    def _thread(self, warpgroup: Warpgroup, body: Callable[[], None]) -> None:
        _thread.warpgroup = warpgroup
        try:
            with np.errstate(all="ignore"):
                self._await_turn(warpgroup)
                body()
                if warpgroup.products:
                    raise Fault(f"nothing waited for the {warpgroup.products[-1]}")
                for store in warpgroup.stores:
                    if store not in warpgroup.read_stores:
                        raise Fault(f"nothing waited for the {store}")
                warpgroup.finished = True
                self.draw_until(warpgroup)
        except _Stopped:
            pass
        except BaseException as error:  # to be raised in the thread that runs the machine
            self.error = error
            for other in self.warpgroups:
                other.turn.set()

    def _await_turn(self, warpgroup: Warpgroup) -> None:
        warpgroup.turn.wait()
        warpgroup.turn.clear()
        if self.error is not None:
            raise _Stopped

    def draw_until(self, warpgroup: Warpgroup) -> None:
        """Lets others go on until this warpgroup is drawn; a finished one returns when another has been."""
        while candidates := self._candidates():
            if self.count % REDRAWN == 0:
                self.weights = collections.defaultdict(lambda: 10 ** self.draws.uniform(-2.5, 0))
            self.count += 1
            weights = [self.weights[getattr(candidate, "kind", candidate)] for candidate in candidates]
            (drawn,) = self.draws.choices(candidates, weights)
            if isinstance(drawn, Operation):
                drawn.steps.popleft()()
                if drawn in self.loads:
                    self.loads.remove(drawn)
                    self.loaded.append(drawn)
            elif drawn is warpgroup:
                return
            else:
                drawn.turn.set()
                if not warpgroup.finished:
                    self._await_turn(warpgroup)
                return
        if not all(group.finished for group in self.warpgroups):
            raise Fault("\n  ".join(("deadlock", *(group.state() for group in self.warpgroups))))

    def _candidates(self) -> list[Warpgroup | Operation]:
        found: list[Warpgroup | Operation] = list(self.loads)
        for group in self.warpgroups:
            if not group.finished and (group.ready is None or group.ready()):
                found.append(group)
            found += [store for store in group.stores if store.steps]
            found += [product for product in group.products if product.steps][:1]
        return found
