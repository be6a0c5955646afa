"""Which normed products the Mosaic GPU kernel takes, and which of them it is made for."""

from pallas_kernels.launch.sizes import cdiv
from pallas_kernels.normed_product.shape import NormedProductShape

DTYPES = ("bfloat16", "float16")
MAX_ROWS = 16
TILE_ROWS = 8  # of what copies swizzle; a copy goes beyond the end of an array by whole tiles, or from its only one
CHUNK = 64  # channels of the rows that lie together: 128 bytes
COLUMNS = 64  # of the matrix, that a program multiplies
DEPTH = 128  # rows of the matrix in a tile
NORM_CHANNELS = 256  # that are normed at a time, where so many divide the inputs
MULTIPROCESSORS = 132  # of the largest Hopper cards
SHARED_MEMORY = 227 * 1024  # bytes of a multiprocessor
RESERVED = 6 * 1024  # of them for barriers, sums across warps, alignment and what the system takes
_HOPPER = 9  # compute capability 9.x, whose matrix instructions (wgmma) the kernel uses


def unsupported_reason(shape: NormedProductShape) -> str | None:
    """Why the kernel cannot multiply and what comes nearest; None where it can."""
    if shape.capability is not None and shape.capability[0] != _HOPPER:
        return f"it needs a card of compute capability 9.x, this one has {shape.capability[0]}.{shape.capability[1]}"
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.rows > MAX_ROWS:
        return f"{shape.rows} rows are more than {MAX_ROWS}; implementation 'xla' takes them"
    if shape.inputs % DEPTH:
        return f"{shape.inputs} inputs are no multiple of {DEPTH}; implementation 'xla' takes them"
    if shape.outputs % COLUMNS:
        return f"{shape.outputs} outputs are no multiple of {COLUMNS}; implementation 'xla' takes them"
    if stages(shape) < min(2, num_tiles(shape)):
        return f"{shape.rows} rows of {shape.inputs} inputs leave no room for two tiles of the matrix"
    return None


def fills_card(shape: NormedProductShape) -> bool:
    """Whether programs of one wave take two thirds of the multiprocessors or more.

    Fewer keep too few bytes of the matrix on their way, and a second wave waits for the first.
    """
    return 2 * MULTIPROCESSORS <= 3 * programs(shape) <= 3 * MULTIPROCESSORS


def padded_rows(shape: NormedProductShape) -> int:
    """Rows as the matrix instructions take them."""
    return cdiv(shape.rows, TILE_ROWS) * TILE_ROWS


def programs(shape: NormedProductShape) -> int:
    """One for each strip of the matrix."""
    return cdiv(shape.outputs, COLUMNS)


def num_tiles(shape: NormedProductShape) -> int:
    """Of a strip."""
    return shape.inputs // DEPTH


def stages(shape: NormedProductShape) -> int:
    """Tiles on their way or waiting: as many as fit beside the rows, their scale and the result."""
    rows = 2 * padded_rows(shape) * (shape.inputs + COLUMNS) + 4 * shape.inputs
    return min((SHARED_MEMORY - RESERVED - rows) // (2 * DEPTH * COLUMNS), num_tiles(shape))
