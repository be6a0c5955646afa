"""What programs of a cluster store to each other's shared memory, for `mosaic_emulator`."""

import dataclasses

import numpy as np

from tests.pallas_kernels.mosaic_machine import Operation, fault, running
from tests.pallas_kernels.mosaic_memory import Barriers, Ref


def async_store_smem(value: np.ndarray, target: Ref, barrier: Barriers, *, cluster_idx: int, cluster_dim: str) -> None:
    """`plgpu.async_store_smem`: of another program along an axis; its barrier has an arrival when all is there."""
    running().step()
    target = dataclasses.replace(target, memory=target.memory.along[cluster_dim][cluster_idx])
    arrival = barrier.only.along[cluster_dim][cluster_idx]
    if (value.shape, value.dtype) != (target.shape, target.dtype):
        raise fault(f"{value.dtype} {value.shape} stored to {target.dtype} {target.shape} of {target.memory.name}")
    store = Operation("load", running())
    target.memory.access(target, store, writes=True)
    target.memory.array[target.index()] = np.nan

    def arrive():
        target.memory.array[target.index()] = value
        arrival.arrive(store.clock)

    store.steps.append(arrive)
    running().machine.loads.append(store)
