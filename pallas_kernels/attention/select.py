"""Which implementations of softmax attention take a call."""

from typing import Literal

from pallas_kernels.attention import cudnn_fmha, mosaic_gpu_tiling, tpu_tiling, triton_decode_tiling
from pallas_kernels.attention.shape import AttentionShape

Implementation = Literal["cudnn", "mosaic_gpu", "triton", "pallas_tpu"]


def unsupported_reason(implementation: Implementation, shape: AttentionShape) -> str | None:
    """Why an implementation cannot run a call and what comes nearest; None where it can."""
    match implementation:
        case "cudnn":
            return cudnn_fmha.unsupported_reason(shape)
        case "mosaic_gpu":
            return mosaic_gpu_tiling.unsupported_reason(shape)
        case "triton":
            return triton_decode_tiling.unsupported_reason(shape)
        case "pallas_tpu":
            return tpu_tiling.unsupported_reason(shape)
