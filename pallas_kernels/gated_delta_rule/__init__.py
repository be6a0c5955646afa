"""Kernels of the gated delta rule (arXiv 2412.06464): a state that a gate fades and each write corrects.

`shape.GatedDeltaRuleShape` holds the sizes of a call, `triton_tiling.unsupported_reason` says whether the Triton
kernels take it.
"""
