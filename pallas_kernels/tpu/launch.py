"""One way to start a kernel: operands by name, grid and sizes static, a fresh function for every trace."""

import types
from collections.abc import Callable, Mapping

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.tpu.plan import Plan

Interpret = bool | pltpu.InterpretParams


def launch(
    kernel: Callable[[Plan, types.SimpleNamespace], None],
    name: str,
    plan: Plan,
    grid: tuple[int, ...],
    semantics: str,
    inputs: Mapping[str, tuple[jax.Array, pl.BlockSpec]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Mapping[str, tuple[tuple[int, ...], jax.typing.DTypeLike]],
    interpret: Interpret,
) -> dict[str, jax.Array]:
    """Runs `kernel(plan, refs)` over `grid`; `refs` has one attribute for every input, output and scratch buffer.

    Args:
      semantics: one letter for every grid axis: "p" if its steps are independent, "a" if they run in order.
    """
    names = [*inputs, *outputs, *scratch]

    def body(*refs):
        kernel(plan, types.SimpleNamespace(**dict(zip(names, refs, strict=True))))

    results = pl.pallas_call(
        body,
        name=name,
        grid=grid,
        in_specs=[spec for _, spec in inputs.values()],
        out_specs=[spec for _, spec in outputs.values()],
        out_shape=[shape for shape, _ in outputs.values()],
        scratch_shapes=[pltpu.VMEM(shape, dtype) for shape, dtype in scratch.values()],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=tuple("parallel" if letter == "p" else "arbitrary" for letter in semantics)
        ),
        interpret=interpret,
    )(*(array for array, _ in inputs.values()))
    return dict(zip(outputs, results, strict=True))
