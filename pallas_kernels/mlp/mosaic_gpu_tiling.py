"""How the Mosaic GPU kernels of the MLP cut their products into tiles, and which products they take."""

import dataclasses
import math

from pallas_kernels.mlp.shape import MlpShape

CHUNK = 64  # rows and columns of what an epilogue computes at a time: 128 bytes a row, as shared memory is swizzled
SHARED_MEMORY = 227 * 1024
ACCUMULATOR = 128  # registers of a thread, float32 sums: 64 x 256 or 128 x 128 of a warpgroup
BARRIER_BYTES = 1024  # room for barriers
ERF_BY = ("exp2", "tanh")
DTYPES = ("bfloat16", "float16")
_HOPPER = 9  # compute capability 9.x, whose matrix instructions (wgmma) the kernels use


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How a product is cut.

    Attributes:
      rows, columns: of the result, of a tile. With `turns` each of the two compute groups has tiles of its own, and
        one is in its epilogue while the other multiplies; else they have halves of a tile, one above the other.
      depth: of a step, columns of the left operand.
      stages: steps in flight.
      turns: see `rows`.
      down, beside: programs of a cluster, 1 or 2 each, whose tiles lie one above the other and share the right operand,
        and side by side and share the left one.
      band: tiles, of clusters, one above the other that are computed before those beside them, so that the second
        level cache holds their operands.
      lag: steps that the second compute group starts after the first one; then it is so far behind at a tile's end as
        well, and multiplies while the first one is in its epilogue. Without `turns` alone.
      erf_by: the machine's function by which GELU is computed.
    """

    rows: int = 128
    columns: int = 256
    depth: int = 64
    stages: int = 4
    turns: bool = False
    down: int = 2
    beside: int = 1
    band: int = 8
    lag: int = 0
    erf_by: str = "exp2"

    @property
    def parts(self) -> int:
        """Programs of a cluster."""
        return self.down * self.beside

    @property
    def group_rows(self) -> int:
        """Rows of a compute group's accumulator."""
        return self.rows if self.turns else self.rows // 2

    @property
    def chunks(self) -> int:
        """Of a compute group's part of a tile."""
        return self.group_rows * self.columns // CHUNK**2


# The fastest of those that were timed on an H200, of 32,768 tokens, width 2048 and hidden size 8192.
UP = Tiling(columns=128, stages=6, turns=True, beside=2)
DOWN_BACKWARD = Tiling(erf_by="tanh")
MULTIPROCESSORS = 132  # of the largest Hopper cards
# A cluster of four lies within one of the card's groups of multiprocessors, which they do not fill: on an H200 32 of
# them did not run at once, and what waited for the others' end doubled the time.
UP_MULTIPROCESSORS = 120


def chunk_place(tiling: Tiling, i: int) -> tuple[int, int]:
    """The operand (0 left, 1 right) in whose part of a stage chunk i is put that the epilogue reads, and its rows."""
    left = tiling.rows // CHUNK
    return (0, i * CHUNK) if i < left else (1, (i - left) * CHUNK)


def tiles_of(shape: MlpShape, tiling: Tiling) -> tuple[int, int]:
    """Tiles of clusters, along rows and columns of the result."""
    return shape.tokens // (tiling.rows * tiling.down), shape.hidden // (tiling.columns * tiling.beside)


def shared_bytes(tiling: Tiling) -> int:
    stage = (tiling.rows + tiling.columns) * tiling.depth * 2
    return tiling.stages * stage + 2 * 2 * CHUNK**2 * 2 + BARRIER_BYTES


def tiling_reason(shape: MlpShape, tiling: Tiling) -> str | None:
    """Why the kernels cannot cut a product so; None if they can."""
    rows, columns = tiling.rows * tiling.down, tiling.columns * tiling.beside
    accumulator = tiling.group_rows * tiling.columns // 128
    for wrong, reason in (
        (shape.dtype not in DTYPES, f"dtype is bfloat16 or float16, not {shape.dtype}"),
        (tiling.depth != CHUNK, f"depth is {CHUNK}, not {tiling.depth}"),
        (tiling.down not in (1, 2), f"down is 1 or 2, not {tiling.down}"),
        (tiling.beside not in (1, 2), f"beside is 1 or 2, not {tiling.beside}"),
        (tiling.erf_by not in ERF_BY, f"erf_by is one of {ERF_BY}, not {tiling.erf_by!r}"),
        (tiling.group_rows % CHUNK or tiling.columns % CHUNK, f"a compute group's tile is no multiple of {CHUNK}"),
        (tiling.columns > 256, f"columns is at most 256, not {tiling.columns}"),
        (accumulator > ACCUMULATOR, f"sums take {accumulator} registers of a thread, at most {ACCUMULATOR}"),
        (tiling.chunks % 2, "a compute group has an odd number of chunks"),
        (tiling.chunks > (tiling.rows + tiling.columns) // CHUNK, "a stage is too small for a group's chunks"),
        (tiling.lag and tiling.turns, "lag is 0 where compute groups take turns"),
        (not 0 <= tiling.lag < tiling.stages, f"lag is from 0 to {tiling.stages - 1}, not {tiling.lag}"),
        (tiling.stages < 3, f"stages is at least 3, not {tiling.stages}"),
        (shared_bytes(tiling) > SHARED_MEMORY, f"{shared_bytes(tiling)} bytes of shared memory, of {SHARED_MEMORY}"),
        (shape.tokens % rows, f"tokens is no multiple of {rows}: {shape.tokens}"),
        (shape.hidden % columns, f"hidden is no multiple of {columns}: {shape.hidden}"),
        (shape.width % tiling.depth, f"width is no multiple of {tiling.depth}: {shape.width}"),
        (
            shape.width // tiling.depth < tiling.stages,
            f"width has fewer steps than {tiling.stages} stages: {shape.width}",
        ),
    ):
        if wrong:
            return reason
    if (down := tiles_of(shape, tiling)[0]) % tiling.band:
        return f"band {tiling.band} does not divide {down} tiles"
    return None


def unsupported_reason(shape: MlpShape) -> str | None:
    """Why the kernels cannot run an MLP, forward and backward, and what comes nearest; None where they can."""
    both = (UP, DOWN_BACKWARD)
    rows = math.lcm(*(tiling.rows * tiling.down * tiling.band for tiling in both))
    columns = math.lcm(*(tiling.columns * tiling.beside for tiling in both))
    least = max(tiling.stages * tiling.depth for tiling in both)
    if shape.capability is not None and shape.capability[0] != _HOPPER:
        return f"it needs a card of compute capability 9.x, this one has {shape.capability[0]}.{shape.capability[1]}"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.tokens % rows:
        return f"{shape.tokens} tokens of all rows are no multiple of {rows}; implementation 'xla' takes them"
    if shape.hidden % columns:
        return f"{shape.hidden} hidden units are no multiple of {columns}; implementation 'xla' takes them"
    if shape.width % CHUNK or shape.width < least:
        return f"width {shape.width} is no multiple of {CHUNK} from {least} on; implementation 'xla' takes it"
    return None
