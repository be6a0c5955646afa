"""Which device holds what: the mesh, and one table that maps the axes of parameters to its axes.

The mesh has four axes. `data` repeats the model; `fsdp` cuts parameters and optimizer state into parts, which are
gathered where they are used; batches are cut along both. `context` cuts the tokens of every sequence into neighbouring
parts (and parameters as `fsdp` does), `tensor` cuts heads, the hidden channels of MLPs and the vocabulary.
"""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rat_jax.config import Config, MeshConfig, ModelConfig
from rat_jax.errors import ConfigError
from rat_jax.mesh import BATCH_AXES, CONTEXT_AXIS, TENSOR_AXIS
from rat_jax.model import LanguageModel, parameter_spec

# What each logical axis of a parameter (`rat_jax.parameters`) is cut along. Layers are stacked along the first axis,
# which stays whole: a scan runs over it.
MESH_AXES: dict[str, tuple[str, ...]] = {
    "vocab": ("tensor",),
    "width": ("fsdp", "context"),
    "projected": ("tensor",),
    "mlp": ("tensor",),
    "kv_channels": ("fsdp", "context"),  # K H, of what has no axis along the width
}
_LARGEST_REPLICATED = 1 << 20  # elements of a parameter that may stay whole on every device of the fsdp axis


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None, naming: str = "config.mesh.") -> Mesh:
    """The mesh of all devices (None: those that jax sees).

    Args:
      config: sizes of its axes.
      devices: of all hosts.
      naming: what stands before an axis in messages.

    Raises:
      ConfigError: if the axes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    wanted = dataclasses.asdict(config)
    rest = len(devices) // math.prod(max(size, 1) for size in wanted.values())
    sizes = {name: rest if size == -1 else size for name, size in wanted.items()}
    if math.prod(sizes.values()) != len(devices):
        axes = ", ".join(f"{naming}{name} {size}" for name, size in wanted.items())
        advice = (
            f"those that are given must divide {len(devices)}"
            if -1 in wanted.values()
            else "set one of them to -1 to use all that remain"
        )
        raise ConfigError(f"{axes} do not multiply to the {len(devices)} devices that are there; {advice}")
    kinds = (AxisType.Auto,) * len(sizes)
    return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), tuple(sizes), axis_types=kinds)


def describe_axes(mesh: Mesh) -> str:
    """Axes and their sizes in words: those of rows, and of the others those that cut something."""
    return ", ".join(f"{name} {size}" for name, size in mesh.shape.items() if size > 1 or name in BATCH_AXES)


def check_divides(config: Config, mesh: Mesh) -> None:
    """Checks that batches and parameters can be cut for a mesh.

    Raises:
      ConfigError: naming the two numbers that do not divide.
    """
    parts = config.optimizer.accumulation_steps
    rows = config.data.global_batch_size // parts
    of_rows = num_row_parts(mesh)
    if rows % of_rows:
        raise ConfigError(
            f"config.data.global_batch_size {config.data.global_batch_size} over config.optimizer.accumulation_steps "
            f"{parts} is {rows} sequences at a time, which do not divide among {of_rows} devices"
            f"{'' if of_rows == mesh.size else ' of the data and fsdp axes'}"
        )
    check_tokens_divide(config.model, config.data.seq_len, mesh, "config.data.seq_len", "config.mesh.context")
    check_parameters_divide(config.model, mesh)


def check_tokens_divide(model: ModelConfig, num_tokens: int, mesh: Mesh, of: str, by: str) -> None:
    """Checks that rows of so many tokens, and the heads of a model, can be cut for a mesh.

    Args:
      model: whose mixers read them.
      num_tokens: of a row.
      mesh: of the devices.
      of: what the number of tokens is called in messages.
      by: what the axis is called that cuts them.

    Raises:
      ConfigError: naming the two numbers that do not divide.
    """
    context, tensor = mesh.shape[CONTEXT_AXIS], mesh.shape[TENSOR_AXIS]
    if num_tokens % context:
        raise ConfigError(f"{of} {num_tokens} does not divide into the {context} parts of {by}")
    for name, settings in model.mixers.items():
        try:
            settings.check_cut(model, num_tokens // context, context, tensor)
        except ConfigError as error:
            raise ConfigError(f"config.model.{name}: {error}") from None


def check_parameters_divide(model: ModelConfig, mesh: Mesh) -> None:
    """Checks that a model's parameters can be cut for a mesh.

    Raises:
      ConfigError: naming the two numbers that do not divide.
    """
    params = jax.eval_shape(lambda: nnx.state(LanguageModel(model, rngs=nnx.Rngs(0))))
    for name, leaf in zip(leaf_names(params), jax.tree.leaves(params), strict=True):
        for axis, size in zip(_logical_axes(name, leaf.ndim), leaf.shape, strict=True):
            mesh_axes = () if axis is None else tuple(part for part in MESH_AXES[axis] if mesh.shape[part] > 1)
            count = math.prod(mesh.shape[part] for part in mesh_axes)
            if size % count:
                raise ConfigError(
                    f"config.model has a parameter, {name}, whose axis {axis} of {size} does not divide by the "
                    f"{' and '.join(mesh_axes)} axis of {count} devices"
                )


def leaf_names(tree: Any) -> list[str]:
    """A name for every leaf, in the order of `jax.tree.leaves`: `blocks.00_rat.mixer.in_proj.kernel`, say."""
    return [_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(tree)[0]]


def partition_specs(tree: Any) -> Any:
    """The PartitionSpec of every leaf of parameters, or of an optimizer state, whose names end like parameters'.

    Scalars are replicated.

    Raises:
      ValueError: if no part of the model names a leaf.
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
            if leaf.size > _LARGEST_REPLICATED and not any("fsdp" in (part or ()) for part in spec):
                raise ValueError(f"{name} {leaf.shape} would be whole on all {mesh.shape['fsdp']} devices of fsdp")
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, _shortest(spec, mesh)), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )


def num_row_parts(mesh: Mesh) -> int:
    """Parts that a mesh cuts the rows of a batch into."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the devices that they are cut among, whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the devices that they are cut among, and their tokens."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES, CONTEXT_AXIS))


def share_of_rows(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """Which part of a batch's rows the devices of a process (None: this one) hold, and how many such parts there are.

    Processes whose devices hold other tokens, or other heads, of the same rows have the same part.
    """
    process = jax.process_index() if process is None else process
    by_row = mesh.devices.reshape(mesh.shape["data"] * mesh.shape["fsdp"], -1)
    own = [row for row, devices in enumerate(by_row) if any(d.process_index == process for d in devices)]
    return own[0] // len(own), len(by_row) // len(own)


def constrain(tree: Any) -> Any:
    """Inside jit, keeps parameters or an optimizer state cut as the table says; nothing outside of a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, partition_specs(tree))


def global_batch(tree: Any, mesh: Mesh) -> Any:
    """Arrays [B, T] of all hosts' rows on the mesh, from the rows of this host (`share_of_rows`)."""
    sharding = batch_sharding(mesh)
    place, count = share_of_rows(mesh)

    def put(x: np.ndarray) -> jax.Array:
        shape, first = (x.shape[0] * count, *x.shape[1:]), place * x.shape[0]

        def part(index: tuple[slice, ...]) -> np.ndarray:
            start, stop, _ = index[0].indices(shape[0])
            return x[(slice(start - first, stop - first), *index[1:])]

        return jax.make_array_from_callback(shape, sharding, part)

    return jax.tree.map(put, tree)


def _shortest(spec: PartitionSpec, mesh: Mesh) -> PartitionSpec:
    """The spec as jit writes it for its results, so that they are no new kind of argument: without axes of size 1."""
    axes = []
    for part in spec:
        names = tuple(axis for axis in ((part,) if isinstance(part, str) else part or ()) if mesh.shape[axis] > 1)
        axes.append(names[0] if len(names) == 1 else names or None)
    while axes and axes[-1] is None:
        axes.pop()
    return PartitionSpec(*axes)


def _logical_axes(name: str, ndim: int) -> tuple[str | None, ...]:
    """Axes of a parameter; that of stacked layers, which comes first, has no name."""
    axes = parameter_spec(name).axes
    if ndim not in (len(axes), len(axes) + 1):
        raise ValueError(f"{name} has {ndim} axes, its PARAMETERS table names {axes}")
    return (None,) * (ndim - len(axes)) + axes


def _spec(name: str, ndim: int) -> PartitionSpec:
    if ndim == 0:
        return PartitionSpec()
    spec = PartitionSpec(*(None if axis is None else MESH_AXES[axis] for axis in _logical_axes(name, ndim)))
    check_spec(name, spec, ndim)
    return spec


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
