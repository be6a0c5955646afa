"""Runs the bodies of Mosaic GPU kernels on NumPy, as Hopper's asynchronous machine might.

`install` puts other functions behind the names of `plgpu`, `pl`, `lax` and `jnp` in the modules of the kernels. Inside
a kernel there are only these; outside there are jax's own, but for `plgpu.kernel`, which then takes concrete arrays.
The order of everything that may happen in several is drawn:

* A copy from global memory leaves its target undefined (NaN) until it is done. One to global memory reads its source
  some time before that is waited for, and writes later still.
* A product reads its operands in shared memory some time before its accumulator is waited for.

Copies and products that find stores which are not committed, accesses that nothing orders, waits without end and all
else that `Fault` is raised for end the kernel. Layouts and the number of registers are not emulated. Programs, or
clusters of them, run one after the other; but if the kernel calls `pl.get_global`, all of the grid run together, as if
a card had room for them.
"""

import dataclasses
import inspect
import itertools
import math
import random
import re
import sys
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import scipy.special
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels.mosaic_machine import Fault, Machine, Operation, fault, running
from tests.pallas_kernels.mosaic_memory import (
    Barrier,
    Barriers,
    Global,
    Ref,
    Semaphore,
    Semaphores,
    Shared,
    Slice,
    Transposed,
)
from tests.pallas_kernels.mosaic_peers import async_store_smem

MODULES = re.compile(r"pallas_kernels\.\w+\.mosaic_gpu\w*|tests\.pallas_kernels\.mosaic_gpu\w*")
SHARED_MEMORY = 227 * 1024  # bytes that a program may have
PRODUCT_DTYPES = (ml_dtypes.bfloat16, np.float16)


def install(monkeypatch: pytest.MonkeyPatch, seed: int, *, all_used: bool = False) -> None:
    """Until the test is over kernels are emulated, in an order of which the seed decides.

    If `all_used`, shared memory that a call reserves and none of its programs reads or writes is a fault.
    """
    draws = random.Random(seed)
    host = {"plgpu": {"kernel": lambda body, **options: _kernel(draws, all_used, body, **options)}}
    real = {"plgpu": plgpu, "pl": pl, "lax": lax, "jnp": jnp}
    for name, module in list(sys.modules.items()):
        if MODULES.fullmatch(name):
            for alias in real.keys() & vars(module).keys():
                names = _Names(real[alias], NAMES[alias], host.get(alias, {}))
                monkeypatch.setattr(module, alias, names)
    launch = sys.modules["pallas_kernels.launch.mosaic_gpu"]
    monkeypatch.setattr(
        launch, "overwriting_kernel", lambda body, **options: _overwriting(draws, all_used, body, **options)
    )
    monkeypatch.setattr(launch, "load_row_of_other_half", lambda ref: np.roll(ref[...], ref.shape[0] // 2))


class _NeedsWholeGrid(Exception):
    """A kernel whose programs run one after the other asks for what all of them share."""


class _Names:
    """A module, as kernels and the functions that launch them see it."""

    def __init__(self, real: types.ModuleType, inside: dict[str, Any], outside: dict[str, Any]):
        self._real, self._inside, self._outside = real, inside, outside

    def __getattr__(self, name: str) -> Any:
        if running() is None:
            return self._outside[name] if name in self._outside else getattr(self._real, name)
        if name not in self._inside:
            raise AttributeError(f"the emulator has no {self._real.__name__}.{name}; add it to `NAMES`")
        return self._inside[name]


def _kernel(
    draws: random.Random,
    all_used: bool,
    body: Callable[..., None],
    *,
    out_type: Any,
    scratch_types: Any,
    grid: tuple[int],
    grid_names: tuple[str],
    num_threads: int,
    thread_name: str,
    kernel_name: str,
    compiler_params: Any,
    cluster: tuple[int, ...] = (1,),
    cluster_names: tuple[str, ...] = ("cluster",),
    overwrites: bool = False,
) -> Callable[..., Any]:
    """`plgpu.kernel` for a grid of one axis.

    If it `overwrites` its last argument, that is written as results are, and follows them.
    """
    places = list(itertools.product(*map(range, cluster)))  # of programs in their cluster
    parameters = [name for name, q in inspect.signature(body).parameters.items() if q.kind == q.POSITIONAL_OR_KEYWORD]

    def named(position, make, *arguments, **options):
        name = parameters[position] if position < len(parameters) else f"argument {position}"
        return make(name, *arguments, **options)

    def run_in_turn(arrays, turns):
        """The results, which are computed by so many programs at a time."""
        results = out_type if isinstance(out_type, tuple) else (out_type,)
        overwritten = {len(arrays) - 1} if overwrites else set()
        memory = [named(i, Global, np.array(x), result=i in overwritten) for i, x in enumerate(arrays)]
        for x in results:
            memory.append(named(len(memory), Global, np.full(x.shape, _undefined(x.dtype), x.dtype), result=True))
        reserved, touched = set(), set()  # shared memory, by name
        for programs in turns:
            scratch, arguments = [], {}
            for program in programs:
                parts = [
                    [named(len(memory) + i, _scratch, kind) for i, kind in enumerate(scratch_types)] for _ in places
                ]
                for peers in zip(*parts, strict=True):
                    _introduce(peers, places, cluster_names)
                for place, part in zip(places, parts, strict=True):
                    used = sum(s.array.nbytes for s in part if isinstance(s, Shared))
                    if used > SHARED_MEMORY:
                        raise Fault(f"{kernel_name} has {used} bytes of shared memory, of {SHARED_MEMORY}")
                    scratch += part
                    arguments[program, *place] = [
                        Ref.of(s) if isinstance(s, (Global, Shared)) else s for s in (*memory, *part)
                    ]
            names = (*grid_names, *cluster_names)
            axes = [
                dict(zip(names, place, strict=True)) | {thread_name: group}
                for place in arguments
                for group in range(num_threads)
            ]
            Machine(draws, axes, whole_grid=len(turns) == 1).run(
                lambda of=arguments, names=names: body(*of[tuple(running().axes[name] for name in names)])
            )
            for barriers in scratch:
                if isinstance(barriers, Barriers):
                    for barrier in barriers.barriers:
                        barrier.check_end()
            reserved |= {s.name for s in scratch if isinstance(s, Shared)}
            touched |= {s.name for s in scratch if isinstance(s, Shared) and s.is_used}
        if all_used and reserved != touched:
            raise Fault(f"{kernel_name} has memory that it does not use: {', '.join(sorted(reserved - touched))}")
        written = memory[len(arrays) :] + [memory[i] for i in overwritten]
        values = tuple(jnp.asarray(x.array) for x in written)
        return values if isinstance(out_type, tuple) else values[0]

    def run(*arrays):
        programs = list(range(*grid))
        draws.shuffle(programs)
        try:
            return run_in_turn(arrays, [[program] for program in programs])
        except _NeedsWholeGrid:
            return run_in_turn(arrays, [programs])

    return run


def _overwriting(draws: random.Random, all_used: bool, body: Callable[..., None], *, name: str, programs: int, **types):
    """`launch.overwriting_kernel`."""
    axes = {"grid": (programs,), "grid_names": ("program",), "num_threads": 1, "thread_name": "group"}
    return _kernel(draws, all_used, body, kernel_name=name, compiler_params=None, overwrites=True, **axes, **types)


def _scratch(name: str, kind: Any) -> Shared | Barriers | None:
    if kind is None:  # the kernel gets None
        return None
    if isinstance(kind, plgpu.Barrier):
        return Barriers([Barrier(f"{name}[{i}]", kind.num_arrivals) for i in range(math.prod(kind.num_barriers))])
    if isinstance(kind, plgpu.ClusterBarrier):
        count, axes = math.prod(kind.num_barriers), kind.collective_axes
        return Barriers([Barrier(f"{name}[{i}]", kind.num_arrivals, axes=axes) for i in range(count)])
    if not hasattr(kind, "transforms"):
        raise Fault(f"{name}: scratch is a program's own, and semaphores of the grid come from `pl.get_global`")
    tilings = [t.tiling for t in kind.transforms if isinstance(t, plgpu.TilingTransform)]
    return Shared(name, np.full(kind.shape, _undefined(kind.dtype), kind.dtype), *(tilings or [()]))


def _introduce(
    peers: tuple[Shared | Barriers | None, ...], places: list[tuple[int, ...]], axes: tuple[str, ...]
) -> None:
    """Lets the programs of a cluster know where each of them has memory or barriers of one scratch type."""
    for peer, place in zip(peers, places, strict=True):
        along = {
            axis: [i for i, other in enumerate(places) if other[:n] + other[n + 1 :] == place[:n] + place[n + 1 :]]
            for n, axis in enumerate(axes)
        }
        if isinstance(peer, Shared):
            peer.along = {axis: tuple(peers[i] for i in of) for axis, of in along.items()}
        if isinstance(peer, Barriers):
            for n, barrier in enumerate(peer.barriers):
                barrier.along = {axis: tuple(peers[i].barriers[n] for i in of) for axis, of in along.items()}


def _undefined(dtype: Any) -> float | int:
    """What memory holds before anything is written there, and while a copy is under way."""
    return np.iinfo(dtype).min if np.issubdtype(dtype, np.integer) else np.nan


class Accumulator:
    """Float32 sums in registers, to which products are added."""

    def __init__(self, value: np.ndarray):
        self.value, self.products = np.array(value, np.float32), []

    def check_idle(self) -> None:
        if any(product in running().products for product in self.products):
            raise fault("a product to this accumulator is under way")

    def __getitem__(self, index: Any) -> np.ndarray:
        return _accumulator_load(self, wait_n=0)[index]

    def __setitem__(self, index: Any, value: np.ndarray) -> None:
        self.check_idle()
        self.value[index] = value


@dataclasses.dataclass(frozen=True)
class AccumulatorType:
    """What `plgpu.ACC` makes."""

    shape: tuple[int, int]
    dtype: Any

    init = Accumulator

    def make(self) -> Accumulator:
        return Accumulator(np.zeros(self.shape))


def _accumulator_load(accumulator: Accumulator, *, wait_n: int) -> np.ndarray:
    running().wait_for_products(wait_n)
    accumulator.check_idle()
    return accumulator.value.copy()


def _wgmma(accumulator: Accumulator, a: Any, b: Any) -> None:
    running().step()
    product = Operation("product", running())
    left, right = (_operand(x, product) for x in (a, b))
    shape = left().shape[0], right().shape[1]
    if left().shape[1] != right().shape[0] or shape != accumulator.value.shape:
        raise fault(f"{left().shape} times {right().shape} added to {accumulator.value.shape}")
    if left().dtype != right().dtype or left().dtype not in PRODUCT_DTYPES:
        raise fault(f"{left().dtype} times {right().dtype}")

    def add():
        accumulator.value += left().astype(np.float32) @ right().astype(np.float32)

    product.steps.append(add)
    accumulator.products.append(product)
    running().products.append(product)


def _operand(x: Any, product: Operation) -> Callable[[], np.ndarray]:
    """What gives the operand as it is when the product is computed."""
    if isinstance(x, Transposed):
        read = _operand(x.ref, product)
        return lambda: read().T
    if isinstance(x, Ref):
        x.memory.check_committed(x)
        x.memory.access(x, product, writes=False)
        return lambda: x.memory.array[x.index()]
    registers = x.copy()
    return lambda: registers


def _check_copy(outside: Ref, inside: Ref) -> None:
    inside.memory.check_committed(inside)
    if (outside.shape, outside.dtype) != (inside.shape, inside.dtype):
        raise fault(f"copy between {outside.dtype} {outside.shape} and {inside.dtype} {inside.shape}")
    lengths = outside.memory.array.shape
    axes = [(span.start, n) for span, n in zip(outside.spans, lengths, strict=True) if not span.dropped]
    if any(span.start < 0 for span in outside.spans):
        raise fault(f"copy that starts before {outside.memory.name}, at {[span.start for span in outside.spans]}")
    for tile, (start, length) in zip(reversed(inside.memory.tile), reversed(axes), strict=False):
        if start % tile or (length > tile and length % tile):
            raise fault(f"copy from {start} of {length} of {outside.memory.name}, no multiples of {tile}")


def _copy_gmem_to_smem(
    source: Ref, target: Ref, barrier: Barriers, *, collective_axes: tuple[str, ...] | None = None
) -> None:
    running().step()
    _check_copy(source, target)
    if collective_axes is not None:
        _copy_part_to_all(source, target, barrier, *collective_axes)
        return
    load = Operation("load", running())
    source.memory.check_read(source, load)
    target.memory.access(target, load, writes=True)
    target.memory.array[target.index()] = _undefined(target.dtype)

    def arrive():
        target.memory.array[target.index()] = source.memory.padded(source)
        barrier.only.arrive(load.clock)

    load.steps.append(arrive)
    running().machine.loads.append(load)


def _copy_part_to_all(source: Ref, target: Ref, barrier: Barriers, axis: str) -> None:
    """The part of a copy that this program of the cluster takes over for all of them.

    Each program's barrier has one arrival when all parts are there; the parts come in an order of their own.
    """
    peers, mine = target.memory.along[axis], running().axes[axis]
    if target.shape[0] % len(peers):
        raise fault(f"{target.shape} is not copied in {len(peers)} parts")
    rows = target.shape[0] // len(peers)
    own = Slice(mine * rows, rows)
    for there, arrival in zip(peers, barrier.only.along[axis], strict=True):
        part = dataclasses.replace(target, memory=there).at[own]
        load = Operation("load", running())
        source.memory.check_read(source.at[own], load)
        there.access(part, load, writes=True)
        there.array[part.index()] = _undefined(part.dtype)

        def arrive(part=part, arrival=arrival, load=load):
            part.memory.array[part.index()] = source.memory.padded(source.at[own])
            arrival.arrive_in_part(load.clock, len(peers))

        load.steps.append(arrive)
        running().machine.loads.append(load)


def _copy_smem_to_gmem(source: Ref, target: Ref) -> None:
    running().step()
    _check_copy(target, source)
    store = Operation("store", running())
    source.memory.access(source, store, writes=False)

    read: list[np.ndarray] = []
    store.steps.append(lambda: read.append(source.memory.array[source.index()].copy()))
    store.steps.append(lambda: target.memory.write(target, *read, store))
    running().stores.append(store)


def _wait_smem_to_gmem(left: int, *, wait_read_only: bool = False) -> None:
    running().wait_for_stores(left, read_only=wait_read_only)


def _commit_smem() -> None:
    group = running()
    group.step()
    for memory in group.uncommitted:
        memory.commit(group)
    group.uncommitted.clear()


def _barrier_arrive(barrier: Barriers) -> None:
    group = running()
    group.step()
    own, *others = barrier.only.reached()
    own.arrive(group.clock)
    for other in others:  # of programs of the cluster, which an arrival takes its time to reach
        arrival = Operation("load", group)
        arrival.steps.append(lambda other=other, clock=arrival.clock: other.arrive(clock))
        group.machine.loads.append(arrival)
    group.tick()


def _get_global(kind: Any) -> Semaphores:
    """The semaphores of this call, the same ones in all warpgroups of the grid."""
    group = running()
    found = group.machine.semaphores
    if found is None:
        raise _NeedsWholeGrid
    if _is_nested():
        raise fault("semaphores are asked for in a branch or a loop, where each warpgroup might get others")
    if group.calls == len(found):
        shape = kind.get_array_aval().shape
        semaphores = np.empty(shape, object)
        for index in np.ndindex(shape):
            semaphores[index] = Semaphore(f"semaphore {group.calls}{list(index) or ''}")
        found.append(Semaphores(semaphores))
    group.calls += 1
    return found[group.calls - 1]


def _is_nested() -> bool:
    """Whether one of this module's branches or loops is between a kernel's body and a function that the body calls."""
    frame, own = sys._getframe(2), 0
    while frame is not None:
        own += frame.f_code.co_filename == __file__
        frame = frame.f_back
    return own > 1  # the first calls the body


def _load(ref: Ref, index: tuple = (), *, layout: Any, optimized: bool = True) -> np.ndarray:
    return ref[index]


def _iota(dtype: Any, shape: tuple[int, ...], axis: int, *, layout: Any) -> np.ndarray:
    return np.indices(shape, dtype)[axis]


def _when(condition: bool) -> Callable[[Callable[[], None]], None]:
    return lambda body: body() if condition else None


def _loop(lower: int, upper: int) -> Callable[[Callable[[int], None]], None]:
    def run(body):
        for i in range(lower, upper):
            body(i)

    return run


def _fori_loop(lower: int, upper: int, body: Callable[[int, Any], Any], carry: Any) -> Any:
    for i in range(lower, upper):
        carry = body(i, carry)
    return carry


def _run_scoped(body: Callable[..., Any], *kinds: AccumulatorType) -> Any:
    accumulators = [kind.make() for kind in kinds]
    found = body(*accumulators)
    for accumulator in accumulators:
        accumulator.check_idle()
    return found


def _run_state(body: Callable[[Any], None]) -> Callable[[Any], Any]:
    def run(initial):
        several = isinstance(initial, tuple)
        refs = [Accumulator(x.value) for x in (initial if several else (initial,))]
        body(tuple(refs) if several else refs[0])
        values = [ref[...] for ref in refs]
        return values if several else values[0]

    return run


def _where(condition: Any, a: Any, b: Any) -> Any:
    found = np.where(condition, a, b)
    return (found.astype(np.float32) if found.dtype == np.float64 else found)[()]


def _broadcast_in_dim(x: np.ndarray, shape: tuple[int, ...], axes: list[int]) -> np.ndarray:
    return np.broadcast_to(np.expand_dims(x, [i for i in range(len(shape)) if i not in axes]), shape)


def _div(a: int, b: int) -> int:
    """Rounded towards 0, as on the machine."""
    quotient = abs(int(a)) // abs(int(b))
    return quotient if (a < 0) == (b < 0) else -quotient


def _erf(x: np.ndarray) -> np.ndarray:
    return scipy.special.erf(x).astype(x.dtype)


NAMES = {
    "plgpu": {
        "ACC": AccumulatorType,
        "Layout": plgpu.Layout,
        "SemaphoreType": plgpu.SemaphoreType,
        "async_store_smem": async_store_smem,
        "barrier_arrive": _barrier_arrive,
        "barrier_wait": lambda barrier: barrier.only.wait(),
        "broadcasted_iota": _iota,
        "commit_smem": _commit_smem,
        "copy_gmem_to_smem": _copy_gmem_to_smem,
        "copy_smem_to_gmem": _copy_smem_to_gmem,
        "layout_cast": lambda x, layout: x,
        "load": _load,
        "semaphore_signal": lambda semaphore, inc=1, *, memory_scope="sys": semaphore.only.signal(inc),
        "semaphore_wait": lambda semaphore, value=1, *, decrement=True, memory_scope="sys": semaphore.only.wait(
            value, decrement=decrement
        ),
        "store": lambda ref, value, *, optimized: ref.__setitem__(..., value),  # of jax 0.12
        "set_max_registers": lambda count, *, action: None,
        "wait_smem_to_gmem": _wait_smem_to_gmem,
        "wgmma": _wgmma,
        "wgmma_wait": lambda left: running().wait_for_products(left),
        "wgmma_accumulator_load": _accumulator_load,
    },
    "pl": {
        "ds": Slice,
        "get_global": _get_global,
        "loop": _loop,
        "run_scoped": _run_scoped,
        "run_state": _run_state,
        "when": _when,
    },
    "lax": {
        "axis_index": lambda name: running().axes[name],
        "broadcast_in_dim": _broadcast_in_dim,
        "div": _div,
        "erf": _erf,
        "fori_loop": _fori_loop,
        "optimization_barrier": lambda x: x,
        "rem": lambda a, b: int(a) - _div(a, b) * int(b),
        "rsqrt": lambda x: 1 / np.sqrt(x),
        "tanh": np.tanh,
    },
    "jnp": {
        name: getattr(np, name)
        for name in (
            "clip",
            "exp2",
            "float32",
            "full",
            "inf",
            "int32",
            "log",
            "max",
            "maximum",
            "min",
            "minimum",
            "sum",
        )
    }
    | {"where": _where},
}
