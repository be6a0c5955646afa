"""The place of this process in its job: from flags, or from what JAX's own detection finds."""

import dataclasses
import os
import re
from collections.abc import Mapping

from jax._src import cloud_tpu_init  # whether this is a TPU host has no public name, nor has what a cluster says
from jax._src.clusters import ClusterEnv

from rat_jax.program import FlagError

_ADVICE = "give --coordinator_address, --num_processes and --process_id"


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process of how many, and where they meet."""

    address: str  # HOST:PORT of process 0
    num_processes: int
    process_id: int
    # Devices of this host that are this process's; (): all that it sees; None: as JAX has it.
    local_device_ids: tuple[int, ...] | None

    @property
    def host(self) -> str:
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])


def place_of_flags(address: str | None, num_processes: int | None, process_id: int | None) -> Place | None:
    """The place that three flags name; None: none is given, or one process is all.

    Raises:
      FlagError: if some are given and others not, or they do not fit.
    """
    values = {"coordinator_address": address, "num_processes": num_processes, "process_id": process_id}
    given = [f"--{name}" for name, value in values.items() if value is not None]
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if not given:
        return None
    if missing:
        raise FlagError(f"{' and '.join(given)} without {' and '.join(missing)}: give all three, or none")
    if num_processes < 1:
        raise FlagError(f"--num_processes is {num_processes}; it must be 1 or more")
    if not 0 <= process_id < num_processes:
        raise FlagError(
            f"--process_id is {process_id}; of --num_processes {num_processes} it must lie in 0 .. {num_processes - 1}"
        )
    if not re.fullmatch(r".+:\d{1,5}", address) or int(address.rpartition(":")[2]) > 65_535:
        raise FlagError(f"--coordinator_address is {address!r}; it must be HOST:PORT of process 0")
    return _unless_alone(Place(address, num_processes, process_id, None if _names_devices(os.environ) else ()))


def detected_place(within_secs: float) -> Place | None:
    """The place that JAX's detection finds: of SLURM, Open MPI, Kubernetes and Cloud TPU; None: one process is all.

    Raises:
      FlagError: if it finds none.
    """
    try:
        address, num_processes, process_id, _ = ClusterEnv.auto_detect_unset_distributed_params(
            os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, (), None, int(within_secs)
        )
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        raise FlagError(f"--distributed: the other hosts were not found: {error}; {_ADVICE}") from None
    if None in (address, num_processes, process_id):
        raise FlagError(
            f"--distributed: the other hosts were not found: JAX knows SLURM, Open MPI, Kubernetes and Cloud TPU, and "
            f"this process was started by none of them; {_ADVICE}"
        )
    return _unless_alone(Place(address, num_processes, process_id, local_device_ids(os.environ)))


def is_tpu_host() -> bool:
    """Whether this is a host of Cloud TPU, where JAX's detection needs nothing to be given."""
    return cloud_tpu_init.running_in_cloud_tpu_vm and os.environ.get("JAX_PLATFORMS", "") != "cpu"


def local_device_ids(environ: Mapping[str, str]) -> tuple[int, ...] | None:
    """Devices of a process that a cluster started; see `Place`.

    JAX gives each its `SLURM_LOCALID`-th card alone. Here the processes of a node share its cards evenly, so that one
    alone has all of them, and those that SLURM bound to cards of their own have these.

    Raises:
      FlagError: if they do not divide.
    """
    if _names_devices(environ):
        return None
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environ:
        return () if environ["OMPI_COMM_WORLD_LOCAL_SIZE"] == "1" else None
    if "SLURM_LOCALID" not in environ:
        return ()
    tasks = _slurm_tasks(environ)
    if tasks is None:
        return None
    if tasks == 1:
        return ()
    seen, on_node = _cards_seen(environ), environ.get("SLURM_GPUS_ON_NODE", "")
    if on_node.isdecimal() and seen is not None and seen < int(on_node):
        return ()  # bound to cards of its own
    cards = seen if seen is not None else int(on_node) if on_node.isdecimal() else tasks
    if cards % tasks:
        raise FlagError(
            f"the node has {cards} cards for {tasks} tasks of SLURM, which do not divide; use one task a node"
        )
    share, index = cards // tasks, int(environ["SLURM_LOCALID"])
    return tuple(range(index * share, (index + 1) * share))


def _unless_alone(place: Place) -> Place | None:
    return None if place.num_processes == 1 else place


def _names_devices(environ: Mapping[str, str]) -> bool:
    """Whether JAX takes the devices from a variable of its own."""
    return bool(environ.get("JAX_LOCAL_DEVICE_IDS"))


def _slurm_tasks(environ: Mapping[str, str]) -> int | None:
    """Tasks of this step on this node; None if SLURM does not say."""
    counts = []  # by node
    for part in environ.get("SLURM_STEP_TASKS_PER_NODE", environ.get("SLURM_TASKS_PER_NODE", "")).split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = environ.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdecimal() and int(node) < len(counts) else None


def _cards_seen(environ: Mapping[str, str]) -> int | None:
    for name in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"):
        if environ.get(name):
            return len(environ[name].split(","))
    return None
