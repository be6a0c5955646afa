"""Which implementations of the RAT mixing op take a call.

On a GPU the recurrence is Triton's, but for its backward pass where Mosaic GPU has one; "triton", "mosaic_gpu" and
"cudnn" differ in the attention to chunk summaries.
"""

from collections.abc import Callable
from typing import Any, Literal

from pallas_kernels.rat import cudnn_attention, mosaic_gpu_tiling, tpu_tiling, triton_tiling
from pallas_kernels.rat.shape import RatShape

GpuImplementation = Literal["triton", "mosaic_gpu", "cudnn"]
Implementation = GpuImplementation | Literal["pallas_tpu"]
Pass = Callable[..., tuple[Any, ...]]  # of a shape and arrays


def unsupported_reason(implementation: Implementation, shape: RatShape) -> str | None:
    """Why an implementation cannot run a call and what comes nearest; None where it can."""
    match implementation:
        case "triton":
            return triton_tiling.unsupported_reason(shape)
        case "mosaic_gpu":
            return mosaic_gpu_tiling.unsupported_reason(shape) or _recurrence_unsupported_reason(shape)
        case "cudnn":
            return cudnn_attention.unsupported_reason(shape) or _recurrence_unsupported_reason(shape)
        case "pallas_tpu":
            return tpu_tiling.unsupported_reason(shape)


def attention_passes(implementation: Literal["mosaic_gpu", "cudnn"]) -> tuple[Pass, Pass]:
    """Forward and backward pass of the attention to summaries by another back end than Triton."""
    match implementation:
        case "mosaic_gpu":
            from pallas_kernels.rat import mosaic_gpu_attention, mosaic_gpu_attention_backward

            return mosaic_gpu_attention.forward, mosaic_gpu_attention_backward.backward
        case "cudnn":
            return cudnn_attention.forward, cudnn_attention.backward


def _recurrence_unsupported_reason(shape: RatShape) -> str | None:
    reason = triton_tiling.unsupported_reason(shape)
    return None if reason is None else f"its recurrence is Triton's, which cannot run this call: {reason}"
