"""The mesh in use, as functions of arrays ask for it: axes of batch rows, and constraints inside jit.

`rat_jax.sharding` makes meshes and says how parameters are cut.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from rat_jax.shapes import Array, Int

BATCH_AXES = ("data", "fsdp")  # of a mesh; batches are cut along both


def num_devices() -> int:
    """Devices among which arrays are still to be divided: those of the mesh in use; 1 outside of a mesh.

    Inside `jax.shard_map` arrays are a device's own, so that axes which it has cut do not count.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(size for name, size in mesh.shape.items() if name not in mesh.manual_axes)


def rows_per_device(batch_size: int) -> int:
    """Rows of a batch that one device of the mesh in use holds, rounded up."""
    return -(-batch_size // num_devices())


def constrain_rows(tree: Any, axis: int = 0) -> Any:
    """Inside jit, keeps arrays cut along the axis of batch rows; nothing outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(*[None] * axis, BATCH_AXES))


def replicate(tree: Any) -> Any:
    """Inside jit, gathers arrays on every device; nothing outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def put_rows(into: Any, rows: Any, places: Int[Array, " _"]) -> Any:
    """Inside jit, writes the rows of arrays into others: row i of `rows` becomes row `places[i]`, no place twice.

    A place that is not in `into` takes nothing. `into` may be cut along its rows over the devices of the mesh in use,
    `rows` is whole on every device; each device writes what is its own, and no array is copied.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return _put(into, rows, places)

    @functools.partial(
        jax.shard_map,
        in_specs=(PartitionSpec(BATCH_AXES), PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(BATCH_AXES),
    )
    def put(into: Any, rows: Any, places: Array) -> Any:
        num_own = jax.tree.leaves(into)[0].shape[0]
        own = places - jax.lax.axis_index(BATCH_AXES) * num_own
        elsewhere = num_own + jnp.arange(own.shape[0], dtype=own.dtype)
        return _put(into, rows, jnp.where((own >= 0) & (own < num_own), own, elsewhere))

    return put(into, rows, places)


def _put(into: Any, rows: Any, places: Array) -> Any:
    return jax.tree.map(lambda old, new: old.at[places].set(new, mode="drop", unique_indices=True), into, rows)
