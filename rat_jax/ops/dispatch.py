"""Where ops meet kernels: which implementation runs, its derivative, and the devices of a mesh; one for all ops."""

import abc
import functools
import numbers
import typing
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from rat_jax.errors import RatJaxError
from rat_jax.mesh import BATCH_AXES, num_parts
from rat_jax.ops import platform
from rat_jax.ops.remat import save_named
from rat_jax.shapes import Array

_PLATFORMS = {"triton": "cuda", "mosaic_gpu": "cuda", "cudnn": "cuda", "pallas_tpu": "tpu"}


class UnsupportedError(RatJaxError, ValueError):
    """A named implementation cannot run a call; the message says why and what comes nearest."""


def check_implementation(name: str | None, implementations: Any) -> None:
    """Refuses a name that is none of the strings of a `Literal`; None asks for no implementation by name.

    Raises:
      UnsupportedError: naming those that there are.
    """
    known = typing.get_args(implementations)
    if name is not None and name not in known:
        raise UnsupportedError(f"implementation must be one of {', '.join(known)}, got {name!r}")


def choose(
    implementation: str | None,
    fastest_first: Sequence[str],
    batch_size: int,
    unsupported_reason: Callable[[str], str | None],
) -> str:
    """The implementation to trace: the named one, else the first for the expected platform that takes the call.

    The latter may still be lowered for another platform, which `run` is told by `fall_back`.

    Args:
      implementation: its name, or None.
      fastest_first: what None chooses from; "xla" where none of them takes the call.
      batch_size: rows of the call, which the devices of a mesh divide among them.
      unsupported_reason: of an implementation by name, other than "xla"; None where it takes the call.

    Raises:
      UnsupportedError: if the named implementation does not take the call.
    """

    def reason_against(name: str) -> str | None:
        count = num_parts(*BATCH_AXES)
        if batch_size % count:
            return f"{batch_size} batch rows do not divide among the {count} devices that the mesh cuts them over"
        return unsupported_reason(name)

    if implementation == "xla":
        return "xla"
    if implementation is None:
        found = (name for name in fastest_first if _is_expected(name) and reason_against(name) is None)
        return next(found, "xla")
    reason = reason_against(implementation) or _wrong_platform(implementation)
    if reason is not None:
        raise UnsupportedError(f"implementation {implementation!r} cannot run this call: {reason}")
    return implementation


def _wrong_platform(name: str) -> str | None:
    wanted, expected = _PLATFORMS[name], platform.expected_platform()
    if wanted == ("cuda" if expected == "gpu" else expected):
        return None
    if name == "pallas_tpu" and expected == "cpu":  # runs there in interpret mode, and compiles ahead of time
        return None
    return f"it runs on {'NVIDIA GPUs' if wanted == 'cuda' else 'TPUs'}, and this program is traced for the {expected}"


def _is_expected(name: str) -> bool:
    expected = platform.expected_platform()
    if _PLATFORMS[name] != ("cuda" if expected == "gpu" else expected):
        return False
    return name != "mosaic_gpu" or platform.expected_capability() is not None  # for cards known to be Hopper alone


def check_floating(**arrays: Array) -> None:
    """Raises ValueError for arrays of whole numbers, in which results would be cut off."""
    for name, x in arrays.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be of floating numbers, got {x.dtype}")


def check_heads(**arrays: Array) -> None:
    """Raises ValueError for arrays that are not [B, T, N, H]."""
    for name, x in arrays.items():
        if x.ndim != 4:
            raise ValueError(f"{name} must be [batch, tokens, heads, channels], got {x.shape}")


def check_whole(least: int, **sizes: int) -> None:
    """Raises ValueError for sizes that are no whole numbers, or too small."""
    for name, size in sizes.items():
        if not isinstance(size, numbers.Integral) or size < least:
            raise ValueError(f"{name} must be a whole number of {least} or more, got {size}")


def differing_dtypes(query: Array, key: Array, value: Array) -> str | None:
    """Why kernels refuse three arrays that are not of one dtype; None where they are."""
    if query.dtype == key.dtype == value.dtype:
        return None
    return f"queries, keys and values differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}"


def rows_of_device(batch_size: int) -> int:
    """Batch rows that a kernel sees, 1 or more."""
    return max(1, batch_size // num_parts(*BATCH_AXES))


class Kernel(abc.ABC):
    """One implementation of an op for static sizes, on one device, and what replaces it on other platforms.

    A frozen dataclass, so that it is compared by its sizes. Arguments and results are pytrees of arrays with batch rows
    along their first axis.

    Attributes:
      implementation: its name.
      replicated: arguments without batch rows: whole on every device, their gradients summed over the devices.
      num_differentiated: so many first arguments have gradients by `backward`; 0 where there is no `backward`.
      saved_results: results that `backward` reads.
      recomputed: `jax.checkpoint` computes the results again even where its policy saves those of kernels.
      without_gradient: results whose gradients `backward` does not take; where one is wanted plain XLA differentiates.
    """

    implementation: str
    replicated: tuple[int, ...]
    num_differentiated: ClassVar[int]
    saved_results: ClassVar[tuple[int, ...]] = ()
    recomputed: ClassVar[bool] = False
    without_gradient: ClassVar[tuple[int, ...]] = ()

    @abc.abstractmethod
    def forward(self, *arguments: Any) -> tuple[tuple[Any, ...], Any]:
        """The results, and what `backward` needs besides the arguments and `saved_results`."""

    @abc.abstractmethod
    def plain(self, *arguments: Any) -> tuple[Any, ...]:
        """The results by plain XLA."""

    def backward(
        self, arguments: tuple[Any, ...], saved: tuple[Any, ...], residuals: Any, d_results: tuple[Any, ...]
    ) -> tuple[Any, ...]:
        """Gradients of the first `num_differentiated` arguments; None in `d_results` is zero."""
        raise NotImplementedError


def run(kernel: Kernel, fall_back: bool, *arguments: Any) -> tuple[Any, ...]:
    """Results of a kernel, differentiable; on the devices of a mesh, each runs it on its own batch rows.

    Args:
      kernel: the implementation for the sizes of this call on one device.
      fall_back: True: programs lowered for another platform run the XLA implementation; False: they fail.
      *arguments: of the kernel.
    """
    return _run(kernel, fall_back, arguments)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _run(kernel: Kernel, fall_back: bool, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return _forward_pass(kernel, fall_back, arguments)[0]


def _forward_pass(kernel: Kernel, fall_back: bool, arguments: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
    def plain(*arguments):
        residuals = jax.eval_shape(kernel.forward, *arguments)[1]
        empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), residuals)  # its backward needs none of them
        return kernel.plain(*arguments), empty

    settled = _by_platform(kernel, kernel.forward, plain if fall_back else None)
    found = _on_each_device(settled, num_results=2, replicated=kernel.replicated, summed=())(*arguments)
    return save_named(found) if kernel.num_differentiated and not kernel.recomputed else found


def _forward(kernel: Kernel, fall_back: bool, arguments: tuple[Any, ...]):
    arguments = jax.tree.map(lambda leaf: leaf.value, arguments)
    results, residuals = _forward_pass(kernel, fall_back, arguments)
    return results, (arguments, tuple(results[i] for i in kernel.saved_results), residuals)


def _backward(kernel: Kernel, fall_back: bool, kept, d_results: tuple[Any, ...]):
    arguments, saved, residuals = kept
    count, given = kernel.num_differentiated, len(arguments)
    unwanted = any(not _is_zero(d_results[i]) for i in kernel.without_gradient)
    d_results = tuple(
        None if i in kernel.without_gradient and _is_zero(d) else _instantiated(d) for i, d in enumerate(d_results)
    )

    def plain(*operands):
        return _plain_backward(kernel, operands[:given], operands[given + 2], count)

    def by_kernel(*operands):
        return kernel.backward(operands[:given], *operands[given:])

    if not count:  # rarely wanted, so that plain XLA will do
        return (_plain_backward(kernel, arguments, d_results, given),)
    operands = (*arguments, saved, residuals, d_results)
    if unwanted:
        return ((*plain(*operands), *[None] * (given - count)),)
    settled = _by_platform(kernel, by_kernel, plain if fall_back else None)
    gradients = _on_each_device(settled, num_results=count, replicated=kernel.replicated, summed=kernel.replicated)(
        *operands
    )
    return ((*gradients, *[None] * (given - count)),)


_run.defvjp(_forward, _backward, symbolic_zeros=True)


def _plain_backward(kernel: Kernel, arguments: tuple[Any, ...], d_results: tuple[Any, ...], count: int):
    results, pull_back = jax.vjp(lambda *first: kernel.plain(*first, *arguments[count:]), *arguments[:count])
    d_results = tuple(
        jax.tree.map(jnp.zeros_like, result) if d is None else d for result, d in zip(results, d_results, strict=True)
    )
    return pull_back(d_results)


def _is_zero(gradient: Any) -> bool:
    return all(isinstance(leaf, SymbolicZero) for leaf in jax.tree.leaves(gradient))


def _instantiated(gradient: Any) -> Any:
    return jax.tree.map(lambda d: jnp.zeros(d.shape, d.dtype) if isinstance(d, SymbolicZero) else d, gradient)


def _by_platform(kernel: Kernel, run: Callable[..., Any], plain: Callable[..., Any] | None) -> Callable[..., Any]:
    if plain is None:
        return run
    platforms = {_PLATFORMS[kernel.implementation]: run}
    return lambda *arguments: jax.lax.platform_dependent(*arguments, default=plain, **platforms)


def _on_each_device(
    function: Callable[..., Any], *, num_results: int, replicated: tuple[int, ...], summed: tuple[int, ...]
) -> Callable[..., Any]:
    """Wraps a function in `shard_map` over the batch axis, where the mesh in use cuts it.

    Args:
      function: takes pytrees of arrays and returns a tuple of them, all with batch rows along their first axis.
      num_results: length of that tuple.
      replicated: arguments without batch rows, whole on every device.
      summed: results without batch rows, summed over the devices.
    """
    if num_parts(*BATCH_AXES) == 1:
        return function

    def local(*arguments):
        results = function(*arguments)
        return tuple(jax.lax.psum(x, BATCH_AXES) if i in summed else x for i, x in enumerate(results))

    def run(*arguments):
        rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
        in_specs = tuple(whole if i in replicated else rows for i in range(len(arguments)))
        out_specs = tuple(whole if i in summed else rows for i in range(num_results))
        # Kernels do not say over which axes their results vary, so that this cannot be checked.
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)

    return run
