"""Which implementations of linear attention take a call, and where they are."""

from types import ModuleType
from typing import Literal

from pallas_kernels.linear_attention import mosaic_gpu_tiling, tpu_tiling, triton_tiling
from pallas_kernels.linear_attention.shape import LinearAttentionShape

Implementation = Literal["triton", "mosaic_gpu", "pallas_tpu"]


def unsupported_reason(implementation: Implementation, shape: LinearAttentionShape) -> str | None:
    """Why an implementation cannot run a call and what comes nearest; None where it can."""
    match implementation:
        case "triton":
            return triton_tiling.unsupported_reason(shape)
        case "mosaic_gpu":
            return mosaic_gpu_tiling.unsupported_reason(shape)
        case "pallas_tpu":
            return tpu_tiling.unsupported_reason(shape)


def kernels(implementation: Implementation) -> ModuleType:
    """The module with `linear_attention_forward` and `linear_attention_backward`, imported where it is first used."""
    match implementation:
        case "triton":
            from pallas_kernels.linear_attention import triton  # imports Triton, which machines without a GPU may lack

            return triton
        case "mosaic_gpu":
            from pallas_kernels.linear_attention import mosaic_gpu

            return mosaic_gpu
        case "pallas_tpu":
            from pallas_kernels.linear_attention import tpu

            return tpu
