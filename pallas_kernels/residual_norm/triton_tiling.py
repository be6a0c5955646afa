"""Which calls the Triton kernels take, and how tokens are divided among programs."""

from pallas_kernels.launch.sizes import cdiv, next_power_of_2
from pallas_kernels.launch.triton import DTYPES, missing_dependency
from pallas_kernels.residual_norm.shape import ResidualNormShape

MAX_WIDTH = 8192  # whose tokens fit the registers of a program
_NUMBERS = 2048  # of each array that a program has in registers at once, of one token or of several
_PROGRAMS = 512  # at least, where there are tokens for so many
_MOST_TILES = 64  # of a program, which sums the gradient of the scale over them


def unsupported_reason(shape: ResidualNormShape) -> str | None:
    """Why the Triton kernels cannot run a call and what comes nearest; None where it can."""
    if shape.dtype not in DTYPES:
        return f"dtype {shape.dtype} is none of {', '.join(DTYPES)}"
    if shape.width > MAX_WIDTH:
        return f"width {shape.width} is above {MAX_WIDTH}; implementation 'xla' takes it"
    return missing_dependency()


def rows_of(shape: ResidualNormShape) -> int:
    """Tokens that a program has in registers at once."""
    return max(1, _NUMBERS // next_power_of_2(shape.width))


def tiles_of(shape: ResidualNormShape) -> int:
    """So many tokens, or groups of them, a program of the backward pass takes one after the other."""
    return max(1, min(_MOST_TILES, cdiv(shape.tokens, rows_of(shape)) // _PROGRAMS))


def warps_of(shape: ResidualNormShape) -> int:
    """Warps of a program: each thread has 16 numbers of an array."""
    return max(4, next_power_of_2(shape.width) // 512)
