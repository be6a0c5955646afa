"""The MLP's products with its GELU in their epilogues: of u one needs no further pass over memory.

    u = x W_up,  h = gelu(u);       du = (dy W_down^T) gelu'(u),  h = gelu(u).

Sums and GELU are float32. Programs stay, one on each multiprocessor, and compute tile after tile. One warpgroup copies
operands into a ring of shared memory, ahead of use and beyond the end of a tile, and u after the last operands of a
tile in the second product; the two others multiply (see `mosaic_gpu_tiling.Tiling`). Programs of a cluster share an
operand, half of which each copies for both.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.launch.mosaic_gpu import COMPUTE_GROUPS, MEMORY_GROUP
from pallas_kernels.mlp import mosaic_gpu_tiling
from pallas_kernels.mlp.mosaic_gpu_gelu import gelu, gelu_and_slope
from pallas_kernels.mlp.mosaic_gpu_tiling import CHUNK, Tiling, chunk_place, tiles_of, tiling_reason
from pallas_kernels.mlp.shape import MlpShape

DOWN, BESIDE = CLUSTER = ("down", "beside")  # axes of a cluster


def mlp_product_mosaic(
    left,  # [M, K]
    right,  # [K, N]; [N, K] if GRADIENT
    u,  # [M, N]; something else unless GRADIENT
    first,  # [M, N]: u, or du if GRADIENT
    h,  # [M, N]
    left_ring,  # [stages, rows, depth]
    right_ring,  # [stages, depth, columns]; [stages, columns, depth] if GRADIENT
    results,  # [groups, 2, CHUNK, CHUNK]
    filled,  # of each stage; with turns of each compute group and stage, since who waits for a barrier waits always
    consumed,  # as filled
    u_filled,  # of each compute group with turns, else of both; None unless GRADIENT
    turn,  # of each compute group; None without turns and lag
    *,
    shape: MlpShape,
    tiling: Tiling,
    programs: int,
    gradient: bool,
):
    """One program computes every `programs`-th tile."""
    steps, stages = shape.width // tiling.depth, tiling.stages
    u_steps = (1 if tiling.turns else COMPUTE_GROUPS) if gradient else 0
    tile_steps = steps + u_steps
    down, beside = tiles_of(shape, tiling)
    program = lax.axis_index("program")
    part_down, part_beside = (lax.axis_index(name) if tiling.parts > 1 else jnp.int32(0) for name in CLUSTER)
    tiles = lax.div(down * beside - program + (programs - 1), programs)
    group = lax.axis_index("group")

    def barrier_of(step, owner):
        """The barrier of a step's stage, and of its compute group."""
        stage = lax.rem(step, stages)
        return stage + owner * stages if tiling.turns else stage

    def owner_of(step):
        return lax.rem(lax.div(step, tile_steps), COMPUTE_GROUPS)

    def place(tile):
        """The first row and column of a program's tile."""
        at = program + tile * programs
        band, rest = lax.div(at, tiling.band * beside), lax.rem(at, tiling.band * beside)
        row, column = band * tiling.band + lax.rem(rest, tiling.band), lax.div(rest, tiling.band)
        return (row * tiling.down + part_down) * tiling.rows, (column * tiling.beside + part_beside) * tiling.columns

    def load(chunk):
        return launch.load_tile(chunk).astype(jnp.float32)

    def chunk_of(stage, i):
        """Shared memory of a chunk of u."""
        operand, start = chunk_place(tiling, i)
        return (left_ring, right_ring)[operand].at[stage, pl.ds(start, CHUNK)]

    def chunks(row, column):
        """Of a compute group's part of a tile: where it lies in the accumulator, and in the result."""
        for r in range(0, tiling.group_rows, CHUNK):
            for c in range(0, tiling.columns, CHUNK):
                yield (slice(r, r + CHUNK), slice(c, c + CHUNK)), (pl.ds(row + r, CHUNK), pl.ds(column + c, CHUNK))

    @pl.when(group < COMPUTE_GROUPS)
    def _compute():
        plgpu.set_max_registers(launch.COMPUTE_REGISTERS, action="increase")
        own_rows = pl.ds(group - group if tiling.turns else group * tiling.group_rows, tiling.group_rows)

        # The programs of a cluster see an arrival at different times, so that one may be a round of a stage ahead, and
        # its arrivals be counted for the other's last round. It is never ahead by two, as a round of operands needs
        # what the other copies; so a round is over only when all are done with it.
        def release(step):
            plgpu.barrier_arrive(consumed.at[barrier_of(step, group)])

        def multiply_step(acc, step):
            stage = lax.rem(step, stages)
            plgpu.barrier_wait(filled.at[barrier_of(step, group)])
            b = right_ring.at[stage]
            plgpu.wgmma(acc, left_ring.at[stage, own_rows], b.transpose((1, 0)) if gradient else b)

        def multiply(acc, base):
            """Sums up a tile; a stage is left when the products of the one after it have been asked for."""
            multiply_step(acc, base)

            @pl.loop(1, steps)
            def _step(k):
                multiply_step(acc, base + k)
                plgpu.wgmma_wait(1)
                release(base + k - 1)
                if tiling.lag:
                    pl.when((group == 0) & (base + k == tiling.lag))(lambda: plgpu.barrier_arrive(turn.at[1]))

            if tiling.turns:
                plgpu.barrier_arrive(turn.at[1 - group])
            plgpu.wgmma_wait(0)
            release(base + steps - 1)

        def put(i, value, target):
            """Stores one of the two results of a chunk while the other one may still be on its way."""
            result = results.at[group, i]
            plgpu.wait_smem_to_gmem(1, wait_read_only=True)
            result[...] = value.astype(result.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(result, target)

        def finish(acc, row, column, base):
            """Stores u, or du, and h."""
            if gradient:
                plgpu.barrier_wait(u_filled.at[group if tiling.turns else 0])
            for i, ((r, c), at) in enumerate(chunks(row, column)):
                if not gradient:
                    put(0, acc[r, c], first.at[at])
                    # Read back it is rounded, and a chunk's GELU does not come long before its memory is free.
                    put(1, gelu(load(results.at[group, 0]), tiling.erf_by), h.at[at])
                    continue
                stage = lax.rem(base + steps + (0 if tiling.turns else group), stages)
                activated, slope = gelu_and_slope(load(chunk_of(stage, i)), tiling.erf_by)
                put(0, acc[r, c] * slope, first.at[at])
                if i == tiling.chunks - 1:  # after `put`, in which all warps meet: one thread arrives for the group
                    for other in range(u_steps):
                        release(base + steps + other)
                put(1, activated, h.at[at])

        @pl.when(group == 1)
        def _second_group_comes_after_the_first():
            if tiling.turns:
                plgpu.barrier_arrive(turn.at[0])
            if tiling.lag:
                plgpu.barrier_wait(turn.at[1])

        def compute_tile(tile):
            base = tile * tile_steps
            row, column = place(tile)
            row += 0 if tiling.turns else group * tiling.group_rows
            if tiling.turns:
                plgpu.barrier_wait(turn.at[group])

            def sums(acc):
                multiply(acc, base)
                return acc[...]

            acc = pl.run_scoped(sums, plgpu.ACC((tiling.group_rows, tiling.columns), jnp.float32))
            finish(acc, row, column, base)

        if tiling.turns:
            pl.loop(0, lax.div(tiles - group + 1, 2))(lambda i: compute_tile(2 * i + group))
        else:
            pl.loop(0, tiles)(compute_tile)
        plgpu.wait_smem_to_gmem(0)

    @pl.when(group == MEMORY_GROUP)
    def _memory():
        plgpu.set_max_registers(launch.MEMORY_REGISTERS, action="decrease")

        def await_consumed(step):
            plgpu.barrier_wait(consumed.at[barrier_of(step, owner_of(step))])

        def await_stage(step):
            pl.when(step >= stages)(lambda: await_consumed(step - stages))
            return lax.rem(step, stages)

        def shared_along(axis):
            return {"collective_axes": (axis,)} if axis in shared_axes(tiling) else {}

        @pl.loop(0, tiles)
        def _tile(tile):
            base = tile * tile_steps
            row, column = place(tile)

            @pl.loop(0, steps)
            def _fill(k):
                stage, barrier = await_stage(base + k), filled.at[barrier_of(base + k, lax.rem(tile, 2))]
                inner, rows, columns = (
                    pl.ds(k * tiling.depth, tiling.depth),
                    pl.ds(row, tiling.rows),
                    pl.ds(column, tiling.columns),
                )
                b = right.at[columns, inner] if gradient else right.at[inner, columns]
                plgpu.copy_gmem_to_smem(left.at[rows, inner], left_ring.at[stage], barrier, **shared_along(BESIDE))
                plgpu.copy_gmem_to_smem(b, right_ring.at[stage], barrier, **shared_along(DOWN))

            for owner in range(u_steps):
                stage = await_stage(base + steps + owner)
                barrier = u_filled.at[lax.rem(tile, 2) if tiling.turns else 0]
                for i, (_, at) in enumerate(chunks(row + owner * tiling.group_rows, column)):
                    plgpu.copy_gmem_to_smem(u.at[at], chunk_of(stage, i), barrier)

        # What other programs of the cluster send to this one's barriers comes before its end.
        total = tiles * tile_steps
        pl.loop(jnp.maximum(total - stages, 0), total)(await_consumed)


def shared_axes(tiling: Tiling) -> tuple[str, ...]:
    """Axes of a cluster along which programs share an operand: the right one down, the left one beside."""
    return tuple(axis for axis, size in zip(CLUSTER, (tiling.down, tiling.beside), strict=True) if size > 1)


def up(
    shape: MlpShape,
    x: jax.Array,
    matrix: jax.Array,
    *,
    tiling: Tiling | None = None,
    multiprocessors: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """u = x W_up and h = gelu(u), computed from the rounded u; both [M, N] in the dtype of x.

    Args:
      shape: sizes.
      x: [M, K].
      matrix: [K, N], W_up.
      tiling: how the product is cut; None: as `mosaic_gpu_tiling.UP`.
      multiprocessors: that it runs on; None: `mosaic_gpu_tiling.UP_MULTIPROCESSORS`.

    Raises:
      ValueError: `tiling` does not go with the sizes.
    """
    tiling = mosaic_gpu_tiling.UP if tiling is None else tiling
    multiprocessors = mosaic_gpu_tiling.UP_MULTIPROCESSORS if multiprocessors is None else multiprocessors
    return _launch(shape, x, matrix, x, tiling, multiprocessors, gradient=False)


def down_backward(
    shape: MlpShape,
    d_out: jax.Array,
    matrix: jax.Array,
    u: jax.Array,
    *,
    tiling: Tiling | None = None,
    multiprocessors: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """du = (dy W_down^T) gelu'(u) and h = gelu(u); both [M, N] in the dtype of u.

    Args:
      shape: sizes.
      d_out: [M, K], dy.
      matrix: [N, K], W_down.
      u: [M, N].
      tiling: how the product is cut; None: as `mosaic_gpu_tiling.DOWN_BACKWARD`.
      multiprocessors: that it runs on; None: `mosaic_gpu_tiling.MULTIPROCESSORS`.

    Raises:
      ValueError: `tiling` does not go with the sizes.
    """
    tiling = mosaic_gpu_tiling.DOWN_BACKWARD if tiling is None else tiling
    multiprocessors = mosaic_gpu_tiling.MULTIPROCESSORS if multiprocessors is None else multiprocessors
    return _launch(shape, d_out, matrix, u, tiling, multiprocessors, gradient=True)


def _launch(shape, left, right, u, tiling, multiprocessors, *, gradient):
    if (reason := tiling_reason(shape, tiling)) is not None:
        raise ValueError(f"{reason}: {shape}, {tiling}")
    dtype, stages, parts = jnp.dtype(shape.dtype), tiling.stages, tiling.parts
    programs = min(multiprocessors // parts, math.prod(tiles_of(shape, tiling)))
    consumers, barriers = (1, COMPUTE_GROUPS * stages) if tiling.turns else (COMPUTE_GROUPS, stages)
    cluster = {"collective_axes": shared_axes(tiling)} if parts > 1 else {}
    right_tile = (tiling.columns, tiling.depth) if gradient else (tiling.depth, tiling.columns)
    u_barrier = plgpu.Barrier(
        num_arrivals=tiling.chunks * (1 if tiling.turns else COMPUTE_GROUPS),
        num_barriers=COMPUTE_GROUPS if tiling.turns else 1,
    )
    result = jax.ShapeDtypeStruct((shape.tokens, shape.hidden), dtype)
    return launch.kernel(
        functools.partial(mlp_product_mosaic, shape=shape, tiling=tiling, programs=programs, gradient=gradient),
        name="mlp_down_backward_mosaic" if gradient else "mlp_up_mosaic",
        programs=programs,
        cluster=dict(zip(CLUSTER, (tiling.down, tiling.beside), strict=True)) if parts > 1 else None,
        out_type=(result, result),
        scratch_types=(
            launch.tiled((stages, tiling.rows, tiling.depth), dtype),
            launch.tiled((stages, *right_tile), dtype),
            launch.tiled((COMPUTE_GROUPS, 2, CHUNK, CHUNK), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=barriers),
            (plgpu.ClusterBarrier if parts > 1 else plgpu.Barrier)(
                num_arrivals=consumers, num_barriers=barriers, **cluster
            ),
            u_barrier if gradient else None,
            plgpu.Barrier(num_barriers=COMPUTE_GROUPS) if tiling.turns or tiling.lag else None,
        ),
    )(left, right, u)
