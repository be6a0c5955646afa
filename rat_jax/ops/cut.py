"""Calls whose tokens or heads are cut over the devices of a mesh: each device runs the op on its part.

Batch rows are cut by the partitioner, or around kernels by `dispatch`. Tokens and heads are cut here, around the whole
op, because an op knows what its parts must tell each other (`rat_jax.ops.context`), and the partitioner does not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rat_jax.mesh import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS, num_parts, num_parts_here
from rat_jax.shapes import Array

_MESH_AXES = {"B": BATCH_AXES, "T": CONTEXT_AXIS, "N": TENSOR_AXIS, "V": TENSOR_AXIS, "_": None}


def is_cut() -> bool:
    """Whether the mesh in use cuts tokens or heads."""
    return num_parts(CONTEXT_AXIS, TENSOR_AXIS) > 1


def several_devices_reason() -> str | None:
    """Why the mesh in use keeps a kernel from running that takes whole arrays; None where it does not."""
    if (count := num_parts(*BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS)) > 1:
        return f"it runs on one device, and the mesh in use cuts arrays over {count}; implementation 'xla' does"
    return None


def refuse_state(name: str, state: Any) -> None:
    """Refuses to continue rows that are cut.

    Raises:
      ValueError: naming the argument.
    """
    if state is not None:
        raise ValueError(
            f"{name} is not taken where the mesh in use cuts tokens or heads: read into caches on a mesh whose context "
            f"and tensor axes are 1"
        )


def run(
    function: Callable[..., Any], in_axes: tuple[str, ...], out_axes: str | tuple[str, ...], *arguments: Any
) -> Any:
    """The results of a function whose arguments are cut along axes of rows B, tokens T, heads N or ids V, or whole _.

    Args:
      function: of the parts on one device.
      in_axes: the first axes of each argument (a pytree whose arrays all have them), the others are whole: "BTN", say.
      out_axes: likewise of each result.
      *arguments: of the function; what is whole on several devices has the sum of their gradients.

    Raises:
      ValueError: if an axis does not divide among the devices that it is cut over.
    """
    for axes, argument in zip(in_axes, arguments, strict=True):
        for x in jax.tree.leaves(argument):
            _check_divides(axes, x)
    specs = tuple(map(_spec, in_axes))
    out_specs = _spec(out_axes) if isinstance(out_axes, str) else tuple(map(_spec, out_axes))
    # What collectives return is not tracked, nor do kernels say over which axes their results vary.
    return jax.shard_map(function, in_specs=specs, out_specs=out_specs, check_vma=False)(*arguments)


def own_ids(ids: Array, num_own: int) -> Array:
    """Inside of such a region, ids counted from the first of this device's part of the vocabulary, of `num_own` ids."""
    return ids if num_parts_here(TENSOR_AXIS) == 1 else ids - num_own * jax.lax.axis_index(TENSOR_AXIS)


def of_owner(values: Array, own: Array, num_own: int) -> Array:
    """Inside of such a region, of every id the values that the device has whose part of the vocabulary it is in.

    Args:
      values: of each id; whatever they are where it is in another part.
      own: the ids, by `own_ids`.
      num_own: ids of a part.
    """
    if num_parts_here(TENSOR_AXIS) == 1:
        return values
    is_own = ((own >= 0) & (own < num_own)).reshape(own.shape + (1,) * (values.ndim - own.ndim))
    return jax.lax.psum(jnp.where(is_own, values, 0), TENSOR_AXIS)


def _spec(axes: str) -> PartitionSpec:
    return PartitionSpec(*(_MESH_AXES[axis] for axis in axes))


def _check_divides(axes: str, x: Array) -> None:
    for letter, size in zip(axes, x.shape, strict=False):
        names = _MESH_AXES[letter] or ()
        parts = num_parts(*([names] if isinstance(names, str) else names))
        if size % parts:
            what = {"B": "rows", "T": "tokens a row", "N": "heads or channels", "V": "ids"}[letter]
            raise ValueError(f"{size} {what} do not divide among the {parts} parts that the mesh cuts them into")
