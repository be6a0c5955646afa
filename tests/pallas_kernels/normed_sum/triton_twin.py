"""What the tests of the Triton kernels share: a float64 reference, and the same launches over torch tensors.

Run as a program it is the interpreter test, `TRITON_INTERPRET=1 python -m tests.pallas_kernels.normed_sum.triton_twin
CASE`: triton reads that variable when a kernel is defined, so the tests start a process for it.
"""

import dataclasses
import json
import sys

import numpy as np
import torch

from pallas_kernels.normed_sum import triton, triton_tiling
from pallas_kernels.normed_sum.shape import NormedSumShape
from tests.pallas_kernels.torch_launch import DTYPES, run


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call and what its inputs look like."""

    shape: NormedSumShape
    tiles: int | None = None  # of a program of the backward pass; None: as the kernels choose it
    sizes: tuple[float, float] = (1.0, 1.0)  # of the numbers of both arrays


CASES = {
    "tiles": Case(NormedSumShape(70, 2, 128, "float32", 1e-8), tiles=3),
    "one_token": Case(NormedSumShape(1, 3, 64, "float32", 1e-8)),
    "odd_head": Case(NormedSumShape(75, 3, 24, "float32", 1e-2), sizes=(0.1, 3.0)),
    "wide_head": Case(NormedSumShape(9, 1, 256, "float32", 1e-8), sizes=(30.0, 1e-3)),
    "nothing_read": Case(NormedSumShape(20, 2, 16, "float32", 1e-8), sizes=(1.0, 0.0)),
    "bfloat16": Case(NormedSumShape(40, 2, 64, "bfloat16", 1e-8)),
    "float16": Case(NormedSumShape(40, 2, 64, "float16", 1e-8)),
}


def inputs(case: Case, seed: int) -> list[torch.Tensor]:
    """Random arrays, scales and `d_out`."""
    p, rng = case.shape, np.random.default_rng(seed)
    draws = [rng.standard_normal((p.tokens, p.heads * p.head_dim), np.float32) for _ in range(3)]
    first, second, d_out = (
        torch.tensor(size * draw).to(DTYPES[p.dtype]) for size, draw in zip((*case.sizes, 1.0), draws, strict=True)
    )
    scales = [torch.tensor(rng.uniform(0.1, 2.0, p.heads * p.head_dim).astype(np.float32)) for _ in range(2)]
    return [first, second, *scales, d_out]


def reference(case: Case, first, second, first_scale, second_scale) -> torch.Tensor:
    """The op in float64, by its definition."""
    p, total = case.shape, 0.0
    for x, scale in ((first, first_scale), (second, second_scale)):
        heads = x.reshape(p.tokens, p.heads, p.head_dim)
        rms = torch.sqrt(torch.sum(heads * heads, -1, keepdim=True) / p.head_dim + p.epsilon)
        total = total + (heads / rms).reshape(x.shape) * scale
    return total


def errors(case: Case, seed: int = 0) -> dict[str, float]:
    """Norm of the error over norm of the float64 result, for the output and every gradient."""
    *arrays, d_out = inputs(case, seed)
    exact = [x.double().requires_grad_() for x in arrays]
    wanted = reference(case, *exact)
    d_wanted = torch.autograd.grad(wanted, exact, d_out.double())
    (out,) = run(triton.forward_launch(case.shape), *arrays)
    tiles = triton_tiling.tiles_of(case.shape) if case.tiles is None else case.tiles
    *d_arrays, d_first_scale, d_second_scale = run(triton.backward_launch(case.shape, tiles), *arrays, d_out)
    found = {"out": out, "d_first": d_arrays[0], "d_second": d_arrays[1]}
    found |= {"d_first_scale": d_first_scale.sum(0), "d_second_scale": d_second_scale.sum(0)}
    return {
        name: float((a.double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))
        for (name, a), b in zip(found.items(), (wanted, *d_wanted), strict=True)
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps({"case": name} | errors(CASES[name])), flush=True)
