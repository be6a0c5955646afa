"""`--mesh`: how programs that read a trained model spread it and its rows over all devices, of all hosts."""

import dataclasses
import math
from collections.abc import Callable

from absl import flags
from jax.sharding import Mesh

from rat_jax.checkpoints.hosts import gathered
from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import MeshConfig, ModelConfig
from rat_jax.errors import ConfigError
from rat_jax.memory import free_bytes_of_local_devices, gib, tree_bytes
from rat_jax.mesh import BATCH_AXES
from rat_jax.program import FlagError
from rat_jax.sharding import check_parameters_divide, describe_axes, make_mesh

_AXES = tuple(field.name for field in dataclasses.fields(MeshConfig))
_WHOLE = MeshConfig(data=-1, fsdp=1)
_CUT = MeshConfig(data=1, fsdp=-1)

flags.disclaim_key_flags()  # `--help` shows the flag with those of the program that asks for it


@dataclasses.dataclass(frozen=True)
class MeshChoice:
    """What `--mesh` says; without it the memory of the devices decides when the model is known."""

    asked: Mesh | None

    def check_rows_whole(self, what: str) -> None:
        """Refuses a mesh that cuts tokens or heads.

        Args:
          what: cannot be done on it, for the message.

        Raises:
          FlagError: naming the axis and its size.
        """
        sizes = {} if self.asked is None else self.asked.shape
        for axis in sizes:
            if axis not in BATCH_AXES and sizes[axis] > 1:
                raise FlagError(
                    f"--mesh has {axis}={sizes[axis]}, and {what} reads rows whole: give fsdp={sizes[axis]} instead, "
                    f"which cuts the parameters over as many devices"
                )

    def mesh_for(self, model: ModelConfig, say: Callable[[str], None]) -> Mesh:
        """The mesh for a model. All hosts must call this together.

        Args:
          model: whose parameters are float32 on it.
          say: is told of a choice that the memory made.

        Raises:
          ConfigError: if the mesh cannot cut the parameters, naming both numbers.
        """
        mesh = self.asked
        if mesh is None:
            mesh = make_mesh(_WHOLE)
            needed, free = tree_bytes(abstract_model(model)[1]), _least_free_bytes()
            if mesh.size > 1 and free is not None and needed > free // 2:
                mesh = make_mesh(_CUT)
                say(
                    f"the parameters take {gib(needed)}, more than half of the {gib(free)} that a device has free: "
                    f"they are cut, as --mesh=fsdp=-1 says"
                )
        try:
            check_parameters_divide(model, mesh)
        except ConfigError as error:
            raise ConfigError(f"--mesh with {describe_axes(mesh)}: {error}") from None
        return mesh


def define_mesh_flag() -> Callable[[], MeshChoice]:
    """Defines `--mesh`.

    Returns:
      What reads it once flags are parsed, and JAX knows the devices of all hosts. Raises FlagError, ConfigError.
    """
    holder = flags.DEFINE_list(
        "mesh",
        None,
        "devices along axes of the mesh, as fsdp=4 or data=2,fsdp=-1 (-1: all that remain, of data where nothing else "
        "is): data repeats the model, fsdp cuts its parameters; left out: whole parameters on each device if they fit "
        "into half of what it has free, else fsdp=-1",
    )

    def choice() -> MeshChoice:
        if not holder.present or holder.value is None:
            return MeshChoice(None)
        if not any(holder.value):
            raise FlagError("--mesh is empty: give AXIS=SIZE, as fsdp=4, or leave the flag out")
        try:
            return MeshChoice(make_mesh(_parse(holder.value), naming=""))
        except ConfigError as error:
            raise FlagError(f"--mesh: {error}") from None

    return choice


def _parse(parts: list) -> MeshConfig:
    sizes: dict[str, int] = {}
    for part in parts:
        axis, equals, size = part.partition("=")
        if axis not in _AXES or not equals:
            raise FlagError(f"--mesh has {part!r}: it takes AXIS=SIZE with commas between, the axes {', '.join(_AXES)}")
        if axis in sizes:
            raise FlagError(f"--mesh has {axis} twice")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise FlagError(f"--mesh has {part!r}: a size is a whole number, or -1") from None
    rest = 1 if -1 in sizes.values() else -1
    return MeshConfig(**{"data": rest, "fsdp": 1} | sizes)


def _least_free_bytes() -> int | None:
    """What the device of all hosts has free that has least."""
    least = min(math.inf if free is None else free for free in free_bytes_of_local_devices())
    smallest = min(gathered(least))
    return None if math.isinf(smallest) else int(smallest)
