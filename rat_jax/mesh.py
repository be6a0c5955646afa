"""The mesh in use, as functions of arrays ask for it: its axes, and constraints inside jit.

`rat_jax.sharding` makes meshes and says how parameters are cut.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from rat_jax.shapes import Array, Int

BATCH_AXES = ("data", "fsdp")  # of a mesh; batches are cut along both
CONTEXT_AXIS = "context"  # rows are cut along it, into runs of neighbouring tokens
TENSOR_AXIS = "tensor"  # heads, hidden channels of MLPs and the vocabulary are cut along it


def mesh_of_rows(mesh: Mesh) -> Mesh:
    """The same devices with rows alone cut among them: where caches are, and rows of any length."""
    fsdp = mesh.shape["fsdp"]
    sizes = {name: {"data": mesh.size // fsdp, "fsdp": fsdp}.get(name, 1) for name in mesh.axis_names}
    return Mesh(mesh.devices.reshape(tuple(sizes.values())), mesh.axis_names, axis_types=mesh.axis_types)


def num_parts(*axes: str) -> int:
    """Parts that the mesh in use cuts an array into along these of its axes.

    1 outside of a mesh, along axes that it lacks and inside `jax.shard_map`, where arrays are parts already.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes if axis in mesh.shape and axis not in mesh.manual_axes)


def num_parts_here(axis: str) -> int:
    """Inside `jax.shard_map` parts that an axis of the mesh has cut arrays into; 1 elsewhere."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[axis] if axis in mesh.manual_axes else 1


def rows_per_device(batch_size: int) -> int:
    """Rows of a batch that one device of the mesh in use holds, rounded up."""
    return -(-batch_size // num_parts(*BATCH_AXES))


def constrain_rows(tree: Any, axis: int = 0) -> Any:
    """Inside jit, keeps arrays cut along the axis of batch rows; nothing outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(*[None] * axis, BATCH_AXES))


def constrain_tokens(tree: Any, axis: int = 0) -> Any:
    """As `constrain_rows`, of arrays whose next axis is that of tokens, which the mesh may cut too."""
    if num_parts(CONTEXT_AXIS) == 1:
        return constrain_rows(tree, axis)
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(*[None] * axis, BATCH_AXES, CONTEXT_AXIS))


def constrain_stream(x: Array) -> Array:
    """As `constrain_tokens` of [B, T, D], where the mesh cuts tokens or heads; nothing where it cuts rows alone."""
    return x if num_parts(CONTEXT_AXIS, TENSOR_AXIS) == 1 else constrain_tokens(x)


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
