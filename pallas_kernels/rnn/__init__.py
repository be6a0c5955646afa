"""Kernels of the RNN mixing op: gated running means over whole rows, times an output gate.

`shape.RnnShape` holds the sizes of a call, `triton_tiling.unsupported_reason` says whether the Triton kernels take it.
"""
