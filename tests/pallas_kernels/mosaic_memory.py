"""Memory of a program on NumPy arrays, whose elements are NaN until they are written, its barriers and semaphores.

Accesses to shared memory that nothing orders are faults, in whatever order they happened to come, and so are reads of
results.
"""

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.pallas_kernels.mosaic_machine import WRITTEN, Clock, Fault, Operation, Warpgroup, fault, place, running


class Span(NamedTuple):
    """Indices along an axis of an array; a dropped axis has one, and is none of the reference's."""

    start: int
    size: int
    dropped: bool = False


class Slice(NamedTuple):
    """What `pl.ds` makes."""

    start: int
    size: int


Box = tuple[tuple[int, int], ...]  # first index along every axis, and the one after the last


def _apart(box: Box, other: Box) -> bool:
    return any(a >= d or c >= b for (a, b), (c, d) in zip(box, other, strict=True))


def _described(agent: Warpgroup | Operation) -> str:
    return f"{agent} at {place()}" if isinstance(agent, Warpgroup) else str(agent)


class Global:
    """Global memory: an argument, which is only read, or a result, whose elements are written once and then read."""

    def __init__(self, name: str, array: np.ndarray, *, result: bool):
        self.name, self.array, self.is_result = name, array, result
        self.unwritten = np.full(array.shape, result)
        self._writes: list[tuple[Box, Warpgroup | Operation, int, str]] = []

    def read(self, ref: "Ref") -> np.ndarray:
        index = ref.index()
        self.check_read(ref, running())
        return self.array[index].copy()

    def write(self, ref: "Ref", value: np.ndarray, operation: Operation | None = None) -> None:
        """The elements that lie inside the array, as a copy writes them."""
        index, part = ref.clipped()
        if not self.unwritten[index].all():
            raise fault(f"{self.name} is an argument, or has been written there already", operation)
        self.array[index] = value[part]
        self.unwritten[index] = False
        agent = operation or running()
        self._writes.append((ref.box(), agent, WRITTEN if operation else agent.clock[agent], _described(agent)))

    def check_read(self, ref: "Ref", agent: Warpgroup | Operation) -> None:
        """Raises a fault if some of its elements are not written, or by what is not ordered before the agent's read."""
        if not self.is_result:
            return
        index, _ = ref.clipped()
        box, now = ref.box(), _described(agent)
        if self.unwritten[index].any():
            raise Fault(f"race: {self.name} {box}, where nothing has been written, is read by {now}")
        for other_box, other, moment, then in self._writes:
            if _apart(box, other_box):
                continue
            if moment > agent.clock.get(other, 0):
                raise Fault(f"race: {self.name} {box} is read by {now}\n  and written by {then}")
            if isinstance(agent, Operation) and isinstance(other, Warpgroup):  # no fence of theirs is one for copies
                raise Fault(f"{self.name} {box} is read by {now}\n  which need not see what is stored by {then}")

    def padded(self, ref: "Ref") -> np.ndarray:
        """What a copy reads, zeros after the end of the array."""
        found = np.zeros(ref.shape, self.array.dtype)
        index, part = ref.clipped()
        found[part] = self.array[index]
        return found


class Shared:
    """Shared memory.

    Attributes:
      tile: multiples of which, along the last axes, copies take.
      uncommitted: 1 + the warpgroup whose store an element has that copies and products need not see yet, or 0.
      along: the same of the programs that differ from this one in an axis of the cluster alone, and this one, by axis.
    """

    along: dict[str, tuple["Shared", ...]]

    def __init__(self, name: str, array: np.ndarray, tile: tuple[int, ...]):
        self.name, self.array, self.tile = name, array, tile
        self.uncommitted = np.zeros(array.shape, np.int16)
        self._accesses: dict[tuple[Box, Warpgroup | Operation, bool], tuple[int, str]] = {}

    def read(self, ref: "Ref") -> np.ndarray:
        self.access(ref, running(), writes=False)
        return self.array[ref.index()].copy()

    def write(self, ref: "Ref", value: np.ndarray) -> None:
        group = running()
        self.access(ref, group, writes=True)
        self.array[ref.index()] = value
        self.uncommitted[ref.index()] = 1 + group.index
        group.uncommitted.add(self)

    @property
    def is_used(self) -> bool:
        """Whether anything of it has been read or written."""
        return bool(self._accesses)

    def commit(self, group: Warpgroup) -> None:
        self.uncommitted[self.uncommitted == 1 + group.index] = 0

    def check_committed(self, ref: "Ref") -> None:
        if self.uncommitted[ref.index()].any():
            raise fault(f"stores to {self.name} are not committed")

    def access(self, ref: "Ref", agent: Warpgroup | Operation, *, writes: bool) -> None:
        """Raises a fault if an earlier access to some of the same elements is not ordered before this one."""
        box, now = ref.box(), _described(agent)
        for (other_box, other, wrote), (moment, then) in list(self._accesses.items()):
            if other is agent or not (writes or wrote) or _apart(box, other_box):
                continue
            if moment > agent.clock.get(other, 0):
                acts = ["written" if w else "read" for w in (writes, wrote)]
                raise Fault(f"race: {self.name} {box} is {acts[0]} by {now}\n  and {acts[1]} by {then}")
            if writes and all(a <= c and d <= b for (a, b), (c, d) in zip(box, other_box, strict=True)):
                del self._accesses[other_box, other, wrote]  # what is ordered after this one is so after that one too
        self._accesses[box, agent, writes] = agent.clock[agent], now


@dataclasses.dataclass(frozen=True)
class Ref:
    """A part of an array in memory."""

    memory: Global | Shared
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, memory: Global | Shared) -> "Ref":
        return cls(memory, tuple(Span(0, size) for size in memory.array.shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(size for _, size, dropped in self.spans if not dropped)

    @property
    def dtype(self) -> np.dtype:
        return self.memory.array.dtype

    @property
    def at(self) -> "_At":
        return _At(self._part)

    def _part(self, index: Any) -> "Ref":
        several = isinstance(index, tuple) and not isinstance(index, Slice)
        parts = [part for part in (index if several else (index,)) if part is not Ellipsis]
        if len(parts) > len(self.shape):
            raise fault(f"{self.memory.name} of shape {self.shape} has {len(parts)} indices")
        spans = []
        for start, size, dropped in self.spans:
            if dropped or not parts:
                spans.append(Span(start, size, dropped))
                continue
            part = parts.pop(0)
            if part == slice(None):
                part = Slice(0, size)
            if isinstance(part, Slice):
                spans.append(Span(start + int(part.start), part.size))
                continue
            if not 0 <= part < size:
                raise fault(f"index {part} of {self.memory.name}, which has {size} there")
            spans.append(Span(start + int(part), 1, dropped=True))
        return Ref(self.memory, tuple(spans))

    def transpose(self, permutation: tuple[int, ...]) -> "Transposed":
        if permutation != (1, 0):
            raise fault(f"tiles are transposed by (1, 0), not {permutation}")
        return Transposed(self)

    def index(self) -> tuple[slice | int, ...]:
        """For its array, inside which it must lie."""
        for (start, size, _), length in zip(self.spans, self.memory.array.shape, strict=True):
            if start < 0 or start + size > length:
                raise fault(f"{start} to {start + size} of {self.memory.name}, which has {length} there")
        return tuple(start if dropped else slice(start, start + size) for start, size, dropped in self.spans)

    def box(self) -> Box:
        return tuple((start, start + size) for start, size, _ in self.spans)

    def clipped(self) -> tuple[tuple[slice | int, ...], tuple[slice, ...]]:
        """The part before its array's end: the index for the array, and for a value of the reference's shape."""
        index, part = [], []
        for (start, size, dropped), length in zip(self.spans, self.memory.array.shape, strict=True):
            inside = min(max(length - start, 0), size)
            index.append(start if dropped else slice(start, start + inside))
            part += [] if dropped else [slice(0, inside)]
        return tuple(index), tuple(part)

    def __getitem__(self, index: Any) -> np.ndarray:
        running().step()
        return self.memory.read(self._part(index))

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        part = self._part(index)
        part.index()
        if (value.shape, value.dtype) != (part.shape, part.dtype):
            raise fault(f"{value.dtype} {value.shape} stored to {part.dtype} {part.shape} of {self.memory.name}")
        running().step()
        self.memory.write(part, value)


class _At:
    """Indexes without reading."""

    def __init__(self, part: Callable[[Any], Any]):
        self._part = part

    def __getitem__(self, index: Any) -> Any:
        return self._part(index)


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A tile whose axes a product takes in the other order."""

    ref: Ref

    def __getitem__(self, index: Any) -> np.ndarray:
        self._check(index)
        return self.ref[...].T

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        self._check(index)
        self.ref[...] = value.T

    def _check(self, index: Any) -> None:
        if index not in (..., ()):
            raise fault(f"transposed tiles are read and written as a whole, not at {index}")


class Barrier:
    """Counts arrivals; a warpgroup waits for its first, second, ... phase in turn, known from their parity alone.

    Attributes:
      along: the same of the programs that differ from this one in an axis of the cluster alone, and this one, by axis.
      axes: an arrival is also one on the barriers along each of these, and so are those of their programs on this one.
    """

    along: dict[str, tuple["Barrier", ...]]

    def __init__(self, name: str, arrivals: int, *, axes: tuple[str, ...] = ()):
        self.name, self.arrivals, self.arrived, self.axes = name, arrivals, 0, axes
        self._parts = 0  # that have come of collective copies
        self._clock = Clock()
        self._phases: list[Clock] = []  # of those that are over
        self._waits: collections.Counter[Warpgroup] = collections.Counter()

    def reached(self) -> list["Barrier"]:
        """On which an arrival on this one is one."""
        return [self, *(other for axis in self.axes for other in self.along[axis] if other is not self)]

    def arrive(self, clock: Clock) -> None:
        self._clock.join(clock)
        self.arrived += 1
        if self.arrived == self.arrivals * len(self.reached()):
            self.arrived = 0
            self._phases.append(Clock(self._clock))

    def arrive_in_part(self, clock: Clock, parts: int) -> None:
        """A part of a copy in so many is there; the last one arrives."""
        self._clock.join(clock)
        self._parts = (self._parts + 1) % parts
        if self._parts == 0:
            self.arrive(clock)

    def wait(self) -> None:
        group = running()
        phase = self._waits[group]
        group.step(
            lambda: (len(self._phases) - phase) % 2 == 1,
            lambda: f"phase {phase} of {self.name}, of which {len(self._phases)} are over",
        )
        if len(self._phases) > phase + 1:
            raise fault(f"{len(self._phases)} phases of {self.name} were over when phase {phase} was waited for")
        group.clock.join(self._phases[phase])
        self._waits[group] += 1

    def check_end(self) -> None:
        """After the program: who waits for a barrier has waited for all of its phases but the last."""
        for group, waits in self._waits.items():
            if waits < len(self._phases) - 1:
                raise Fault(f"{group} has waited for {waits} of {len(self._phases)} phases of {self.name}")


class Barriers:
    """Barriers of one scratch type, or the one that has been chosen of them."""

    def __init__(self, barriers: list[Barrier]):
        self.barriers = barriers

    @property
    def at(self) -> _At:
        return _At(self._chosen)

    def _chosen(self, index: int) -> "Barriers":
        if not 0 <= index < len(self.barriers):
            raise fault(f"index {index} of {len(self.barriers)} barriers like {self.barriers[0].name}")
        return Barriers([self.barriers[index]])

    @property
    def only(self) -> Barrier:
        (barrier,) = self.barriers
        return barrier


class Semaphore:
    """A number in global memory, 0 when a kernel starts, that warpgroups of all programs raise and wait for.

    A wait is ordered after the signals without which it would go on, those that came first, but not after others that
    happened to be there too.
    """

    def __init__(self, name: str):
        self.name, self._taken = name, 0  # by waits that decrement it
        self._signals: list[tuple[int, Clock]] = []  # the sum so far, and what is ordered before one of them

    @property
    def total(self) -> int:
        return self._signals[-1][0] if self._signals else 0

    def signal(self, increment: int) -> None:
        group = running()
        group.step()
        if increment < 1:
            raise fault(f"signal of {increment} to {self.name}")
        clock = Clock(self._signals[-1][1] if self._signals else ())
        clock.join(group.clock)
        self._signals.append((self.total + increment, clock))
        group.tick()

    def wait(self, value: int, *, decrement: bool) -> None:
        group = running()
        group.step(
            lambda: self.total - self._taken >= value,
            lambda: f"{value} of {self.name}, which is {self.total - self._taken}",
        )
        needed = self._taken + value
        group.clock.join(next((clock for count, clock in self._signals if count >= needed), Clock()))
        if decrement:
            self._taken = needed


class Semaphores:
    """An array of semaphores, or the one that has been chosen of them."""

    def __init__(self, semaphores: np.ndarray):
        self.semaphores = semaphores

    @property
    def at(self) -> _At:
        return _At(self._chosen)

    def _chosen(self, index: Any) -> "Semaphores":
        chosen = index if isinstance(index, tuple) else (index,)
        shape = self.semaphores.shape
        if len(chosen) > len(shape) or not all(0 <= i < n for i, n in zip(chosen, shape, strict=False)):
            raise fault(f"index {index} of semaphores of shape {shape}")
        return Semaphores(np.asarray(self.semaphores[chosen], object))

    @property
    def only(self) -> Semaphore:
        if self.semaphores.shape:
            raise fault(f"one of {self.semaphores.shape} semaphores is signalled or waited for")
        return self.semaphores[()]
