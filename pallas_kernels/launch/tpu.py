"""How TPU kernels start (operands by name, sizes static), and the products and turns that they share."""

import types
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.launch.sizes import LANES

Interpret = bool | pltpu.InterpretParams
Tiling = TypeVar("Tiling")  # static sizes of a call, of whichever op


def launch(
    kernel: Callable[[Tiling, types.SimpleNamespace], None],
    name: str,
    tiling: Tiling,
    grid: tuple[int, ...],
    semantics: str,
    inputs: Mapping[str, tuple[jax.Array, pl.BlockSpec]],
    outputs: Mapping[str, tuple[jax.ShapeDtypeStruct, pl.BlockSpec]],
    scratch: Mapping[str, tuple[tuple[int, ...], jax.typing.DTypeLike]],
    interpret: Interpret,
) -> dict[str, jax.Array]:
    """Runs `kernel(tiling, refs)` over `grid`; `refs` has one attribute for every input, output and scratch buffer.

    Args:
      semantics: one letter for every grid axis: "p" if its steps are independent, "a" if they run in order.
    """
    names = [*inputs, *outputs, *scratch]

    def body(*refs):
        kernel(tiling, types.SimpleNamespace(**dict(zip(names, refs, strict=True))))

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


def matmul(left: jax.Array, right: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Product over one axis of each, operands in the kernel's dtype, summed in float32."""
    return lax.dot_general(
        left,
        right,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT,
        preferred_element_type=jnp.float32,
    )


def to_column(row: jax.Array) -> jax.Array:
    """[1, rows] -> [rows, 1]."""
    return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def to_row(column: jax.Array) -> jax.Array:
    """[rows, 1] -> [1, rows]."""
    return jnp.broadcast_to(column, (column.shape[0], LANES)).T[:1]
