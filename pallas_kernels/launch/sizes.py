"""Numbers, arithmetic and hardware sizes that kernels and tilings share; imports no back end."""

import math

LOG2_E = math.log2(math.e)
SEES_NOTHING = -1e30  # log-sum-exp; above it are all of scores that are seen
ROWS = 64  # of the matrix instruction of a warpgroup on Hopper
LANES = 128  # channels of a vector register on TPU
SUBLANES = 8  # rows of a block on TPU come in multiples of this


def cdiv(a: int, b: int) -> int:
    """The quotient a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()
