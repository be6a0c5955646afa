"""Which calls the Triton kernels take, and the sizes of tiles that they share."""

from pallas_kernels.launch.sizes import next_power_of_2
from pallas_kernels.launch.triton import DTYPES, MAX_GRID_ROWS, MAX_HEAD_DIM, missing_dependency
from pallas_kernels.rat.shape import RatShape

NEVER = 1 << 30  # in place of the token that completes a chunk, where none does
PIECE_TOKENS = 16  # tokens of a chunk whose states the backward recurrence keeps in registers


def unsupported_reason(shape: RatShape) -> str | None:
    """Why the Triton kernels cannot run a call and what comes nearest; None where they can."""
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"head_dim {shape.head_dim} is above {MAX_HEAD_DIM}: an accumulator would not fit the registers"
    if shape.batch > MAX_GRID_ROWS:
        return f"batch {shape.batch} is above {MAX_GRID_ROWS}, the longest grid axis; split the batch"
    return missing_dependency()


def padded_head_dim(shape: RatShape) -> int:
    """Channels of a tile."""
    return max(16, next_power_of_2(shape.head_dim))
