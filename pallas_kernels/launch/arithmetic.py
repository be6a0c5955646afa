"""Integers and constants that kernels of several back ends use."""

import math

LOG2_E = math.log2(math.e)


def cdiv(a: int, b: int) -> int:
    """The quotient a / b rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is n or more."""
    return 1 << (n - 1).bit_length()
