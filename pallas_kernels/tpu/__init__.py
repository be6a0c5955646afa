"""Pallas kernels for TPU: the RAT mixing op, forward and backward."""

from pallas_kernels.tpu.plan import Tiles
from pallas_kernels.tpu.rat import KERNEL_NAMES, RatResiduals, rat_forward, refusal

__all__ = ["KERNEL_NAMES", "RatResiduals", "Tiles", "rat_forward", "refusal"]
