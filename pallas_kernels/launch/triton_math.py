"""Arithmetic that Triton kernels of several ops share."""

import triton
import triton.language as tl


@triton.jit
def sigmoids(x):
    """The sigmoid of x, and 1 less it, each to full relative precision."""
    ratio = tl.exp2(tl.maximum(x, -80.0) * -1.4426950408889634)
    sigmoid = 1.0 / (1.0 + ratio)
    return sigmoid, ratio * sigmoid
