"""Pallas Mosaic GPU kernels, for Hopper: the attention of the RAT mixing op to summaries, forward and backward.

Linear attention stands in `linear_attention`.
"""

from pallas_kernels.mosaic_gpu.attention import forward
from pallas_kernels.mosaic_gpu.attention_backward import backward
from pallas_kernels.mosaic_gpu.problem import refusal

FORWARD_KERNELS = ("rat_attention_forward_mosaic",)
BACKWARD_KERNELS = ("rat_queries_backward_mosaic", "rat_summaries_backward_mosaic")

__all__ = ["BACKWARD_KERNELS", "FORWARD_KERNELS", "backward", "forward", "refusal"]
