"""One kernel launch as data, and how jax-triton runs it: the one place that knows the jax-triton version.

A kernel's parameters are in this order: inputs, run-time integers, outputs, one alias per input that is overwritten,
constants. An overwritten input is returned as an output too; the kernel works on the input's pointer and ignores the
alias parameter (jax-triton 0.3 passes the buffer twice, 0.4 does not).
"""

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import jax

DTYPES = ("bfloat16", "float16", "float32")
MAX_HEAD_DIM = 256  # whose accumulators fit the registers
MAX_GRID_ROWS = 65535


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel with its grid, sizes and compiler options; everything but the arrays."""

    kernel: Any  # a triton JITFunction
    grid: tuple[int, ...]
    integers: tuple[int, ...]  # run-time integers, after the inputs
    outputs: tuple[tuple[tuple[int, ...], str], ...]  # shape and dtype of the new outputs
    constants: tuple[tuple[str, Any], ...]  # parameter names and values
    num_warps: int
    num_stages: int
    overwritten: tuple[int, ...] = ()  # inputs that are updated in place and returned after the new outputs

    @property
    def name(self) -> str:
        return self.kernel.__name__


Run = Callable[..., tuple[Any, ...]]  # run(launch, *inputs) -> outputs


def run(launch: Launch, *inputs: jax.Array) -> tuple[jax.Array, ...]:
    """Runs a launch inside a jitted function that bears the kernel's name, so that lowered text shows it."""
    return tuple(_jitted(launch)(*inputs))


@functools.lru_cache(maxsize=256)
def _jitted(launch: Launch) -> Callable[..., list[jax.Array]]:
    def call(*inputs):
        return _triton_call(launch, inputs)

    call.__name__ = launch.name
    return jax.jit(call)


def _triton_call(launch: Launch, inputs: tuple[jax.Array, ...]) -> list[jax.Array]:
    import jax_triton

    _patch_dce_rule()
    new = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in launch.outputs]
    kept = [jax.ShapeDtypeStruct(inputs[i].shape, inputs[i].dtype) for i in launch.overwritten]
    call = functools.partial(
        jax_triton.triton_call,
        *inputs,
        *launch.integers,
        kernel=launch.kernel,
        grid=launch.grid,
        name=launch.name,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        input_output_aliases={i: len(new) + j for j, i in enumerate(launch.overwritten)},
        **dict(launch.constants),
    )
    if jax_triton.__version_info__ < (0, 4):
        return call(out_shape=[*new, *kept])
    return call(out_type=[*new, *kept], **_unused_aliases(launch))


@functools.cache
def _patch_dce_rule() -> None:
    """jax 0.12 gives rules of dead code elimination three arguments, that of jax-triton 0.4.1 takes two."""
    from jax._src.interpreters import partial_eval
    from jax_triton.triton_lib import triton_kernel_call_p

    rule = partial_eval.dce_rules.get(triton_kernel_call_p)
    if jax.__version_info__ >= (0, 12) and rule is not None and len(inspect.signature(rule).parameters) == 2:
        partial_eval.dce_rules[triton_kernel_call_p] = lambda used, live, equation: rule(used, equation)


def _unused_aliases(launch: Launch) -> dict[str, int]:
    """Values for the alias parameters, to which jax-triton 0.4 binds nothing."""
    names = [name for name in launch.kernel.arg_names if name not in dict(launch.constants)]
    return dict.fromkeys(names[len(names) - len(launch.overwritten) :], 0) if launch.overwritten else {}


def missing_dependency() -> str | None:
    """What must be installed before any Triton kernel runs; None where nothing is missing. Imports neither."""
    missing = [name for name in ("triton", "jax_triton") if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"it needs {' and '.join(missing)}, not installed here: pip install jax-triton (Linux)"


def little_shared_memory(capability: tuple[int, int] | None) -> bool:
    """Whether a program may have 99 KiB of shared memory only: on known cards but 8.0, 8.7, 9.x and 10.x."""
    return capability is not None and capability not in ((8, 0), (8, 7)) and capability[0] not in (9, 10)
