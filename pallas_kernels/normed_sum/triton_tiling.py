"""Which calls the Triton kernels take, and how tokens and heads are divided among programs."""

from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import DTYPES, MAX_HEAD_DIM, missing_dependency
from pallas_kernels.normed_sum.shape import NormedSumShape

NUM_WARPS = 4
FORWARD_NUMBERS, BACKWARD_NUMBERS = 4096, 1024  # of each array that a program has in registers at once
_PROGRAMS = 4096  # of the backward pass, where there are tokens for so many: they fill a card several times
_MOST_TILES = 64  # of a program of the backward pass, which sums gradients of scales over them


def unsupported_reason(shape: NormedSumShape) -> str | None:
    """Why the Triton kernels cannot run a call and what comes nearest; None where they can."""
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.head_dim > MAX_HEAD_DIM:
        return f"head_dim {shape.head_dim} is above {MAX_HEAD_DIM}"
    return missing_dependency()


def block_of(shape: NormedSumShape) -> int:
    """Channels of a tile: the head's, and what is left of a power of two."""
    return next_power_of_2(shape.head_dim)


def tiles_of(shape: NormedSumShape) -> int:
    """Tiles of tokens that a program of the backward pass takes."""
    tiles = cdiv(shape.tokens, BACKWARD_NUMBERS // block_of(shape))
    return max(1, min(_MOST_TILES, tiles * shape.heads // _PROGRAMS))
