"""Kernels of the norm in front of a layer, whose input goes around the layer as well.

`shape.ResidualNormShape` holds the sizes of a call, `triton_tiling.unsupported_reason` says whether the Triton kernels
take it.
"""
