"""What to change about a mesh whose exchanges the compiler is known to do badly."""

import math
from collections.abc import Iterable

import jax

from rat_jax.mesh import CONTEXT_AXIS


def mesh_advice(mesh: jax.sharding.Mesh) -> str | None:
    """A line for users of TPUs whose gradients would be summed whole; None where nothing is known.

    libtpu 0.0.42 sums a gradient that is cut over all chips of a slice by an all-reduce, which sends twice the bytes
    of the reduce-scatter that is meant, if the slice is a square of 4 x 4 chips or more or has three axes. Over part of
    the chips, or all those of a rectangle, it makes reduce-scatters; over 32 and fewer it sends most parts from chip to
    chip beside the products that need them (docs/scaling.md). Parameters are cut along fsdp and context.
    """
    cutting = {name: mesh.shape[name] for name in ("fsdp", CONTEXT_AXIS) if mesh.shape[name] > 1}
    if mesh.devices.flat[0].platform != "tpu" or math.prod(cutting.values()) != mesh.size:
        return None
    sides = [size for size in _sides(mesh.devices.flat) if size > 1]
    is_rectangle = len(sides) < 2 or (len(sides) == 2 and sides[0] != sides[1])
    if is_rectangle or mesh.size <= 32:
        return None
    shape, axes = "x".join(map(str, sides)), " times ".join(f"config.mesh.{name}" for name in cutting)
    return (
        f"{axes} over all {mesh.size} chips of {shape}: the compiler sums whole gradients there, and sends "
        f"them twice; with config.mesh.data=2 it scatters their sums, and each chip holds twice the state"
    )


def _sides(devices: Iterable[jax.Device]) -> list[int]:
    """Chips along each axis of the slice."""
    places = [device.coords for device in devices]
    return [len({place[axis] for place in places}) for axis in range(len(places[0]))]
