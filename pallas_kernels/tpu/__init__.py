"""Pallas kernels for TPU: the RAT mixing op, forward and backward."""

from pallas_kernels.tpu.plan import Tiles
from pallas_kernels.tpu.rat import (
    BACKWARD_KERNELS,
    FORWARD_KERNELS,
    RatResiduals,
    rat_backward,
    rat_forward,
    refusal,
)

__all__ = ["BACKWARD_KERNELS", "FORWARD_KERNELS", "RatResiduals", "Tiles", "rat_backward", "rat_forward", "refusal"]
