"""Runs the bodies of Mosaic GPU kernels on NumPy, as Hopper's asynchronous machine might.

`install` puts other functions behind the names of `plgpu`, `pl`, `lax` and `jnp` in the modules of the kernels. Inside
a kernel there are only these; outside there are jax's own, but for `plgpu.kernel`, which then takes concrete arrays.
The order of everything that may happen in several is drawn:

* A copy from global memory leaves its target NaN until it is done. One to global memory reads its source some time
  before that is waited for, and writes later still.
* A product reads its operands in shared memory some time before its accumulator is waited for.
* Copies and products see what has been committed; neither sees registers before `wait` or `load`.

Layouts, registers and times are not emulated, nor are more than one program at once.
"""

import dataclasses
import inspect
import math
import random
import sys
import types
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.pallas_kernels.mosaic_machine import Fault, Machine, Operation, fault, running
from tests.pallas_kernels.mosaic_memory import Barrier, Barriers, Global, Ref, Shared, Slice, Transposed

PACKAGE = "pallas_kernels.mosaic_gpu"
SHARED_MEMORY = 227 * 1024  # bytes that a program may have
PRODUCT_DTYPES = (ml_dtypes.bfloat16, np.float16)


def install(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Until the test is over kernels are emulated, in an order of which the seed decides."""
    draws = random.Random(seed)
    host = {"plgpu": {"kernel": lambda body, **options: _kernel(draws, body, **options)}}
    real = {"plgpu": plgpu, "pl": pl, "lax": lax, "jnp": jnp}
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{PACKAGE}."):
            for alias in real.keys() & vars(module).keys():
                names = _Names(real[alias], NAMES[alias], host.get(alias, {}))
                monkeypatch.setattr(module, alias, names)


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
) -> Callable[..., Any]:
    """`plgpu.kernel` for a grid of one axis, whose programs run one after the other."""
    parameters = [name for name, q in inspect.signature(body).parameters.items() if q.kind == q.POSITIONAL_OR_KEYWORD]

    def names():
        yield from parameters
        while True:
            yield f"an array or barrier after {parameters[-1]}"

    def run(*arrays):
        results = out_type if isinstance(out_type, tuple) else (out_type,)
        named = names()
        memory = [Global(next(named), np.array(x), result=False) for x in arrays]
        found = [Global(next(named), np.full(x.shape, np.nan, x.dtype), result=True) for x in results]
        memory += found
        programs = list(range(*grid))
        draws.shuffle(programs)
        for program in programs:
            named = names()
            for _ in memory:
                next(named)
            scratch = [_scratch(next(named), kind) for kind in scratch_types]
            used = sum(s.array.nbytes for s in scratch if isinstance(s, Shared))
            if used > SHARED_MEMORY:
                raise Fault(f"{kernel_name} has {used} bytes of shared memory, of {SHARED_MEMORY}")
            arguments = [s if isinstance(s, Barriers) else Ref.of(s) for s in (*memory, *scratch)]
            axes = [{grid_names[0]: program, thread_name: group} for group in range(num_threads)]
            Machine(draws, axes).run(lambda arguments=arguments: body(*arguments))
            for barriers in scratch:
                if isinstance(barriers, Barriers):
                    for barrier in barriers.barriers:
                        barrier.check_end()
        values = tuple(jnp.asarray(x.array) for x in found)
        return values if isinstance(out_type, tuple) else values[0]

    return run


def _scratch(name: str, kind: Any) -> Shared | Barriers:
    if isinstance(kind, plgpu.Barrier):
        return Barriers([Barrier(f"{name}[{i}]", kind.num_arrivals) for i in range(math.prod(kind.num_barriers))])
    tilings = [t.tiling for t in kind.transforms if isinstance(t, plgpu.TilingTransform)]
    return Shared(name, np.full(kind.shape, np.nan, kind.dtype), *(tilings or [()]))


class Accumulator:
    """Float32 sums in registers, to which products are added."""

    def __init__(self, value: np.ndarray):
        self.value = np.array(value, np.float32)

    def read(self, left: int) -> np.ndarray:
        group = running()
        group.wait_for_products(left)
        self._check_idle()
        return self.value.copy()

    def _check_idle(self) -> None:
        if any(target is self for _, target in _pending_targets()):
            raise fault("a product to this accumulator is under way")
