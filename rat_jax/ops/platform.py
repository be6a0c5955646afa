"""Which platform a program is traced for, and running a single-device function on every device of a mesh."""

import typing
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from rat_jax.mesh import BATCH_AXES


def expected_platform() -> str:
    """Of the mesh in use, otherwise of jax's default devices; what is traced may still be lowered for another."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform


def expected_capability() -> tuple[int, int] | None:
    """CUDA compute capability of the devices that are traced for; None where it is not known, or they have none."""
    device = jax.devices()[0]
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.abstract_device is not None and mesh.abstract_device.device_kind != device.device_kind:
        return None
    capability = getattr(device, "compute_capability", None)
    return None if capability is None else tuple(int(number) for number in capability.split("."))


def devices() -> int:
    """Devices of the mesh in use; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def check_implementation(name: str | None, implementations: Any) -> None:
    """Refuses a name that is none of the strings of a `Literal`; None asks for no body by name.

    Raises:
      ValueError: naming those that there are.
    """
    known = typing.get_args(implementations)
    if name is not None and name not in known:
        raise ValueError(f"implementation must be one of {', '.join(known)}, got {name!r}")


def on_each_device(function: Callable[..., Any], *, replicated: tuple[int, ...], summed: tuple[int, ...]) -> Any:
    """`function` as it is on one device; on a mesh, by `shard_map` over the rows of its arguments and results.

    Args:
      function: takes pytrees of arrays and returns a tuple of them, all with batch rows along their first axis.
      replicated: arguments without batch rows, whole on every device.
      summed: results without batch rows, summed over the devices.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function

    def local(*arguments):
        results = function(*arguments)
        return tuple(jax.lax.psum(x, BATCH_AXES) if i in summed else x for i, x in enumerate(results))

    def run(*arguments):
        rows, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
        in_specs = tuple(whole if i in replicated else rows for i in range(len(arguments)))
        num_results = len(jax.eval_shape(function, *arguments))
        out_specs = tuple(whole if i in summed else rows for i in range(num_results))
        # Kernels do not say over which axes their results vary, so that this cannot be checked.
        return jax.shard_map(local, in_specs=in_specs, out_specs=out_specs, check_vma=False)(*arguments)

    return run
