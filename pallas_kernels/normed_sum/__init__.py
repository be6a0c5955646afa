"""Kernels of the sum of two arrays of heads, each normed head by head.

`shape.NormedSumShape` holds the sizes of a call, `triton_tiling.unsupported_reason` says whether the Triton kernels
take it.
"""
