"""Launches of Triton kernels on torch tensors, as the interpreter's tests and those on a GPU run them."""

import math

import torch

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "int32": torch.int32}


def run(launch, *arrays):
    """New outputs, which start as NaN, so that an unwritten element shows; after them inputs that are overwritten."""
    new = [torch.full(shape, math.nan, dtype=DTYPES[dtype], device=arrays[0].device) for shape, dtype in launch.outputs]
    kept = [arrays[i] for i in launch.overwritten]
    launch.kernel[launch.grid](
        *arrays,
        *launch.integers,
        *new,
        *kept,
        **dict(launch.constants),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )
    return (*new, *kept)
