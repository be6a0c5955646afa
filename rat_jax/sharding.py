"""Which device holds what: the mesh, and one table for all parameters.

The mesh has two axes. `data` repeats the model; `fsdp` cuts parameters and optimizer state into parts, which are
gathered where they are used. Batches are cut along both.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rat_jax.config import Config, ConfigError, MeshConfig
from rat_jax.shapes import Array

BATCH_AXES = ("data", "fsdp")

# Names of parameters, as in checkpoints, and how they are cut: along `width`, or along all key heads, so that these
# two must divide by the fsdp axis. Layers are stacked along the first axis, which stays whole: a scan runs over it.
_PARAMETER_SPECS: tuple[tuple[str, PartitionSpec], ...] = (
    (r"embedding", PartitionSpec(None, "fsdp")),  # [V, D]
    (r"blocks\.[^.]+\.(mixer\.in_proj|mlp\.up)\.kernel", PartitionSpec(None, "fsdp", None)),  # [layer, D, any]
    (r"blocks\.[^.]+\.(mixer\.out_proj|mlp\.down)\.kernel", PartitionSpec(None, None, "fsdp")),  # [layer, any, D]
    (r"blocks\.[^.]+\.mixer\.meta_(key|value)", PartitionSpec(None, None, "fsdp")),  # [layer, token, K H]
    (r"blocks\.[^.]+\.mixer\.(gate_bias|query_scale|key_scale)", PartitionSpec()),
    (r"blocks\.[^.]+\.mixer\.(query|key|local|linear)_norm\.scale", PartitionSpec()),
    (r"blocks\.[^.]+\.(mixer|mlp)_norm\.scale", PartitionSpec()),
    (r"final_norm\.scale", PartitionSpec()),
)
_LARGEST_REPLICATED = 1 << 20  # elements of a parameter that may stay whole on every device of the fsdp axis


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of all devices (None: those that jax sees).

    Raises:
      ConfigError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": config.data, "fsdp": config.fsdp}
    known = max(config.data, 1) * max(config.fsdp, 1)
    rest = len(devices) // known
    sizes = {name: rest if size == -1 else size for name, size in sizes.items()}
    if sizes["data"] * sizes["fsdp"] != len(devices):
        raise ConfigError(
            f"config.mesh.data {config.data} and config.mesh.fsdp {config.fsdp} do not multiply to the "
            f"{len(devices)} devices that are there; set one of them to -1 to use all that remain"
        )
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=(AxisType.Auto,) * 2)


def check_divides(config: Config, mesh: Mesh) -> None:
    """Checks that batches and parameters can be cut for a mesh.

    Raises:
      ConfigError: naming the two numbers that do not divide.
    """
    parts = config.optimizer.accumulation_steps
    rows = config.data.global_batch_size // parts
    if rows % mesh.size:
        raise ConfigError(
            f"config.data.global_batch_size {config.data.global_batch_size} over config.optimizer.accumulation_steps "
            f"{parts} is {rows} sequences at a time, which do not divide among {mesh.size} devices"
        )
    if config.model.width % mesh.shape["fsdp"]:
        raise ConfigError(
            f"config.model.width {config.model.width} does not divide by the fsdp axis of {mesh.shape['fsdp']} devices"
        )
    kv_width = config.model.kv_heads * config.model.head_dim
    if "rattention" in config.model.pattern and config.model.rattention.meta_tokens and kv_width % mesh.shape["fsdp"]:
        raise ConfigError(
            f"the {kv_width} channels of config.model's {config.model.kv_heads} key heads do not divide by the fsdp "
            f"axis of {mesh.shape['fsdp']} devices, among which the tokens of rattention.meta_tokens are cut"
        )


def leaf_names(tree: Any) -> list[str]:
    """A name for every leaf, in the order of `jax.tree.leaves`: `blocks.00_rat.mixer.in_proj.kernel`, say."""
    return [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def partition_specs(tree: Any) -> Any:
    """The PartitionSpec of every leaf of parameters, or of an optimizer state, whose names end like parameters'.

    Scalars are replicated.

    Raises:
      ValueError: if a leaf is none of the table, or is of several lines of it.
    """
    leaves, treedef = jax.tree.flatten(tree)
    specs = [_spec(name, leaf.ndim) for name, leaf in zip(leaf_names(tree), leaves, strict=True)]
    return jax.tree.unflatten(treedef, specs)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The NamedSharding of every leaf, as `partition_specs` says.

    Raises:
      ValueError: as `partition_specs`; or if a large parameter would stay whole on every device of an fsdp axis.
    """
    specs = partition_specs(tree)
    if mesh.shape["fsdp"] > 1:
        is_spec = {"is_leaf": lambda x: isinstance(x, PartitionSpec)}
        for name, leaf, spec in zip(
            leaf_names(tree), jax.tree.leaves(tree), jax.tree.leaves(specs, **is_spec), strict=True
        ):
            if leaf.size > _LARGEST_REPLICATED and "fsdp" not in spec:
                raise ValueError(f"{name} {leaf.shape} would be whole on all {mesh.shape['fsdp']} devices of fsdp")
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, _shortest(spec, mesh)), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def constrain(tree: Any) -> Any:
    """Inside jit, keeps parameters or an optimizer state cut as the table says; nothing outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, partition_specs(tree))


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


def rows_per_device(batch_size: int) -> int:
    """Rows of a batch that one device of the mesh in use holds, rounded up."""
    mesh = jax.sharding.get_abstract_mesh()
    return -(-batch_size // (1 if mesh.empty else mesh.size))


def global_batch(tree: Any, mesh: Mesh) -> Any:
    """Arrays of all hosts' rows on the mesh, from the rows of this host."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), tree)


def _shortest(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """The spec as jit writes it for its results, so that they are no new kind of argument: without axes of size 1."""
    axes = [axis if axis is not None and mesh.shape[axis] > 1 else None for axis in spec]
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _spec(name: str, ndim: int) -> PartitionSpec:
    if ndim == 0:
        return PartitionSpec()
    found = [spec for pattern, spec in _PARAMETER_SPECS if re.search(rf"(^|\.){pattern}$", name)]
    if len(found) != 1:
        raise ValueError(f"{name}: {len(found)} lines of the table in rat_jax/sharding.py match; exactly one must")
    check_spec(name, found[0], ndim)
    return found[0]


def check_spec(name: str, spec: PartitionSpec, ndim: int) -> None:
    """Refuses a spec that uses an axis of the mesh twice, or names more axes than an array has.

    Raises:
      ValueError: naming the parameter.
    """
    used = [axis for part in spec if part is not None for axis in ((part,) if isinstance(part, str) else part)]
    if len(used) != len(set(used)):
        raise ValueError(f"{name}: {spec} uses an axis of the mesh twice")
    if len(spec) > ndim:
        raise ValueError(f"{name} has {ndim} axes, fewer than {spec}")


def _name(path: tuple[Any, ...]) -> str:
    parts = []
    for key in path:
        match key:
            case jax.tree_util.DictKey(key=part) | jax.tree_util.GetAttrKey(name=part):
                parts.append(str(part))
            case _:
                raise ValueError(f"{jax.tree_util.keystr(path)} has an index, which is no stable name")
    if parts and parts[-1] == "value":  # of an nnx.Param
        parts.pop()
    return ".".join(parts)
