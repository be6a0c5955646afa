"""How the kernels of outputs and of the gradients of queries go through the blocks of a key head, tile by tile.

Both are sums over the two halves of the features: each of the two warpgroups that compute has one half, of the state
and of everything that is made of features, and the parts of a tile of results are added up at the end.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.mosaic_gpu import COMPUTE_GROUPS, MEMORY_GROUP
from pallas_kernels.launch.sizes import ROWS
from pallas_kernels.linear_attention.mosaic_gpu_blocks import Places, key_tile, real_keys
from pallas_kernels.linear_attention.mosaic_gpu_features import half_features_and_logs
from pallas_kernels.linear_attention.mosaic_gpu_tiling import BLOCK, TILES, Tiling

STAGES = 6  # tiles of keys and of what a kernel takes of each head in flight, and of results on their way to memory
VALUE_STAGES = 2  # tiles of values in flight


@dataclasses.dataclass(frozen=True)
class Sums:
    """What two warpgroups have of a tile is added up in the ring's tile that both have read, and copied to memory.

    Warpgroup 1 leaves its part there, rounded, once warpgroup 0 has read the tile; warpgroup 0 adds its own.

    Attributes:
      ring: whose tiles both warpgroups consume.
      read: barriers of its stages, on which warpgroup 0 arrives.
      stored: barriers of its stages, on which warpgroup 1 arrives.
    """

    ring: launch.Ring
    read: Any
    stored: Any

    def load(self, step: jax.Array, half: int) -> jax.Array:
        """The tile of a step, as it was filled."""
        found = self.ring.wait(step)[...]
        if half == 0:
            plgpu.barrier_arrive(self.read.at[lax.rem(step, self.ring.stages)])
        return found

    def store(self, step: jax.Array, half: int, part: jax.Array, target: Any) -> None:
        stage = lax.rem(step, self.ring.stages)
        tile = self.ring.tiles.at[stage]
        if half == 1:
            plgpu.barrier_wait(self.read.at[stage])
            tile[...] = part.astype(tile.dtype)
            plgpu.barrier_arrive(self.stored.at[stage])
            self.ring.release(step)
        else:
            plgpu.barrier_wait(self.stored.at[stage])
            tile[...] = (part + tile[...].astype(jnp.float32)).astype(tile.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(tile, target)

    def release(self, step: jax.Array, half: int) -> None:
        """Gives back the tile of a step, the last that this warpgroup has stored, once the copy has read it."""
        if half == 0:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            self.ring.release(step)


@dataclasses.dataclass(frozen=True)
class Aligned:
    """What is aligned with a tile of queries, of one half: the state [H, H], features [ROWS, H] of keys, and values."""

    state: Any
    features: Any
    values: Any

    def add_keys(self) -> None:
        """The state takes in the tile's keys; it is rounded again, up to TILES - 1 times in a block."""
        transposed = self.features.transpose((1, 0))
        before = plgpu.ACC.init(self.state[...].astype(jnp.float32))
        after = pl.run_state(lambda ref: plgpu.wgmma(ref, transposed, self.values))(before)
        self.state[...] = after.astype(self.state.dtype)
        plgpu.commit_smem()


# Of sums, half, step, what is aligned, the index of the tile of a head in [B, T, N, H], release.
AddHead = Callable[[Sums, int, jax.Array, Aligned, Any, Callable[[], None]], None]


def run_tiles(
    tiling: Tiling,
    places: Places,
    key: Any,
    value: Any,
    states: Any,
    arrays: tuple[Any, ...],
    scratch: tuple[Any, ...],
    add_head: AddHead,
    store_key_logs: Callable[..., None] | None = None,
) -> None:
    """The whole of a kernel that has `tile_types` as scratch.

    Args:
      tiling: sizes.
      places: of blocks.
      key, value: [B, T, K, H].
      states: [B, K, C, 2, H, H], the sum that enters each block.
      arrays: [B, T, N, H], of which a tile of each head is copied in turn; results take the place of the last.
      scratch: the kernel's.
      add_head: a warpgroup's part of a head of a tile, whose first array is the ring's tile of that step. It calls
        `release`, for the head before, when its own tiles have been loaded, and stores its part last.
      store_key_logs: takes half, row, key head and start of a tile of keys, and its logs of `half_features_and_logs`.
    """
    *rings, read, stored, features = scratch
    ring, state_ring, value_ring = (launch.Ring(*rings[i : i + 3]) for i in (0, 3, 6))
    sums = Sums(ring, read, stored)
    steps = 1 + len(arrays) * tiling.shape.heads_per_key  # of a tile: its keys, then the arrays of each head in turn
    program, group = lax.axis_index("program"), lax.axis_index("group")

    def compute(half):
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")
        key_features = features.at[half]

        @pl.loop(0, places.count(program))
        def _block(i):
            row, k, block = places.of(program, i)
            state = state_ring.wait(i).at[half]

            @pl.loop(0, TILES)
            def _tile(r):
                tile, start = i * TILES + r, block * BLOCK + r * ROWS
                step = tile * steps
                keys = ring.wait(step)[...]
                ring.release(step)
                found, logs = half_features_and_logs(
                    keys, half, softmax=tiling.shape.softmax, real=real_keys(tiling, start - tiling.offset)
                )
                if store_key_logs is not None:
                    pl.when(start >= tiling.offset)(lambda: store_key_logs(half, row, k, start - tiling.offset, logs))
                key_features[...] = found.astype(key_features.dtype)
                plgpu.commit_smem()
                aligned = Aligned(state, key_features, value_ring.wait(tile))

                @pl.loop(0, tiling.shape.heads_per_key)
                def _head(j):
                    first = step + 1 + len(arrays) * j

                    def release():  # the tile that was stored last
                        pl.when(j > 0)(lambda: sums.release(first - 1, half))
                        pl.when((j == 0) & (tile > 0))(lambda: sums.release(step - 1, half))

                    add_head(
                        sums,
                        half,
                        first,
                        aligned,
                        (row, pl.ds(start, ROWS), k * tiling.shape.heads_per_key + j),
                        release,
                    )

                pl.when(r < TILES - 1)(aligned.add_keys)
                value_ring.release(tile)

            state_ring.release(i)

        plgpu.wait_smem_to_gmem(0)

    for half in range(2):
        pl.when(group == half)(lambda half=half: compute(half))

    @pl.when(group == MEMORY_GROUP)
    def _memory():
        plgpu.set_max_registers(launch.MEMORY_REGISTERS, action="decrease")

        @pl.loop(0, places.count(program))
        def _block(i):
            row, k, block = places.of(program, i)

            @pl.loop(0, TILES)
            def _tile(r):
                tile, start = i * TILES + r, block * BLOCK + r * ROWS
                step = tile * steps
                ring.fill(step, key_tile(key, row, start - tiling.offset, k))
                value_ring.fill(tile, key_tile(value, row, start - tiling.offset, k))

                @pl.when(r == 0)
                def _of_block():
                    state_ring.fill(i, *(states.at[row, k, block, half] for half in range(2)))

                @pl.loop(0, tiling.shape.heads_per_key)
                def _head(j):
                    at = row, pl.ds(start, ROWS), k * tiling.shape.heads_per_key + j
                    for s, array in enumerate(arrays):
                        ring.fill(step + 1 + len(arrays) * j + s, array.at[at])


def tile_types(tiling: Tiling) -> tuple[Any, ...]:
    """Scratch types of a kernel that is `run_tiles`."""
    dtype, H = jnp.dtype(tiling.shape.dtype), tiling.shape.head_dim
    return (
        *launch.ring_types(STAGES, (ROWS, H), dtype, consumers=COMPUTE_GROUPS),
        *launch.ring_types(1, (2, H, H), dtype, consumers=COMPUTE_GROUPS),
        *launch.ring_types(VALUE_STAGES, (ROWS, H), dtype, consumers=COMPUTE_GROUPS),
        plgpu.Barrier(num_barriers=STAGES),
        plgpu.Barrier(num_barriers=STAGES),
        launch.tiled((2, ROWS, H), dtype),
    )
