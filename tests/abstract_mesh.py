"""Meshes without devices, to trace for."""

import jax
from jax.sharding import AxisType


def abstract_mesh(**sizes) -> jax.sharding.AbstractMesh:
    """A mesh with all of the project's axes, of which those that are not named have one device."""
    axes = dict.fromkeys(("data", "fsdp", "context", "tensor"), 1) | sizes
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes))
