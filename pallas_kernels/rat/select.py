"""Which back end computes RAT's attention to chunk summaries on a GPU; the recurrence is Triton's with all of them."""

from collections.abc import Callable
from typing import Any, Literal

from pallas_kernels.rat import cudnn_attention, mosaic_gpu_tiling
from pallas_kernels.rat.shape import Problem

Implementation = Literal["triton", "mosaic_gpu", "cudnn"]
Pass = Callable[..., tuple[Any, ...]]  # of a problem and arrays
_HOPPER = 9  # compute capability 9.x


def forward_and_backward(implementation: Literal["mosaic_gpu", "cudnn"]) -> tuple[Pass, Pass]:
    """Both passes of the attention to summaries by another back end than Triton."""
    match implementation:
        case "mosaic_gpu":
            from pallas_kernels.rat import mosaic_gpu_attention, mosaic_gpu_attention_backward

            return mosaic_gpu_attention.forward, mosaic_gpu_attention_backward.backward
        case "cudnn":
            return cudnn_attention.forward, cudnn_attention.backward


def refusal(implementation: Implementation, p: Problem) -> str | None:
    """Why a back end cannot run a problem that Triton takes, and what comes nearest; None where it can."""
    if implementation == "triton":
        return None
    if implementation == "cudnn":
        return cudnn_attention.refusal(p)
    if p.capability is not None and p.capability[0] != _HOPPER:
        return f"it needs a card of compute capability 9.0, this one has {p.capability[0]}.{p.capability[1]}"
    return mosaic_gpu_tiling.refusal(p)


def fastest(p: Problem) -> Implementation:
    """What is fastest where it takes the problem: Mosaic GPU on Hopper, at every length measured there.

    Elsewhere Triton, because cuDNN, which beats it on Hopper from 4096 summaries on, was not measured on other cards.
    """
    on_hopper = p.capability is not None and p.capability[0] == _HOPPER
    return "mosaic_gpu" if on_hopper and refusal("mosaic_gpu", p) is None else "triton"
