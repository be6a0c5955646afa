"""Kernels of convolved heads: short convolutions of queries, keys and values, silu, and unit length of the first two.

`shape.ConvolvedHeadsShape` holds the sizes of a call, `triton_tiling.unsupported_reason` says whether the Triton
kernels take it.
"""
