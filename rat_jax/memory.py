"""How much memory a device has free, and how much arrays take."""

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

_CGROUP_LIMIT = pathlib.Path("/sys/fs/cgroup/memory.max")


def free_bytes(device: jax.Device) -> int | None:
    """Bytes that a device has free, a CPU those of the host; None where the platform does not tell."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    return _host_bytes() if device.platform == "cpu" else None


def free_bytes_of_local_devices() -> list[int | None]:
    """As `free_bytes`, of each device of this host; those of a CPU have equal parts of the host's memory."""
    devices = jax.local_devices()
    sharing = len(devices) if devices[0].platform == "cpu" else 1
    return [None if (free := free_bytes(device)) is None else free // sharing for device in devices]


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays of a tree, which may be shapes only."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def gib(num_bytes: int) -> str:
    """For messages: in units of 2**30 bytes."""
    return f"{num_bytes / 2**30:,.1f} GiB"


def is_out_of_memory(error: jax.errors.JaxRuntimeError) -> bool:
    """Whether a device, or a CPU's host, refused an allocation."""
    return "RESOURCE_EXHAUSTED" in str(error) or "Out of memory" in str(error)


@contextlib.contextmanager
def explaining_out_of_memory(explain: Callable[[], Exception]) -> Iterator[None]:
    """Where an allocation is refused, what `explain` returns is raised in its place; other errors stay as they are."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise explain() from None


def _host_bytes() -> int | None:
    """What Linux calls available, or the limit of the container where that is lower."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # another system
        return None
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    limit = _CGROUP_LIMIT.read_text().strip() if os.access(_CGROUP_LIMIT, os.R_OK) else "max"
    limits = [number for number in (available, None if limit == "max" else int(limit)) if number is not None]
    return min(limits, default=None)
