"""The mesh in use, as functions of arrays ask for it: axes of batch rows, and constraints inside jit.

`rat_jax.sharding` makes meshes and says how parameters are cut.
"""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from rat_jax.shapes import Array

BATCH_AXES = ("data", "fsdp")  # of a mesh; batches are cut along both


def num_devices() -> int:
    """Devices of the mesh in use; 1 outside of a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def rows_per_device(batch_size: int) -> int:
    """Rows of a batch that one device of the mesh in use holds, rounded up."""
    return -(-batch_size // num_devices())


def constrain_rows(tree: Any, axis: int = 0) -> Any:
    """Inside jit, keeps arrays cut along the axis of batch rows; nothing outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec(*[None] * axis, BATCH_AXES))


def replicate(x: Array) -> Array:
    """Inside jit, gathers an array on every device; nothing outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec())
