"""What the tests of the Triton kernels share: a float64 reference, and the same launches over torch tensors.

Run as a program it is the interpreter test, `TRITON_INTERPRET=1 python -m
tests.pallas_kernels.residual_norm.triton_twin CASE`: triton reads that variable when a kernel is defined, so the tests
start a process for it.
"""

import dataclasses
import json
import sys

import numpy as np
import torch

from pallas_kernels.residual_norm import triton, triton_tiling
from pallas_kernels.residual_norm.shape import ResidualNormShape
from tests.pallas_kernels.torch_launch import DTYPES, run


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call and what its inputs look like."""

    shape: ResidualNormShape
    tiles: int | None = None  # of a program of the backward pass; None: as the kernel chooses it
    size: float = 1.0  # of the tokens' numbers


CASES = {
    "tiles": Case(ResidualNormShape(70, 384, "float32", 1e-6), tiles=3),
    "one_token": Case(ResidualNormShape(1, 64, "float32", 1e-6)),
    "odd_width": Case(ResidualNormShape(75, 300, "float32", 1e-2), size=0.1),
    "wide": Case(ResidualNormShape(5, 2500, "float32", 1e-6), tiles=2, size=30.0),
    "nothing_read": Case(ResidualNormShape(20, 16, "float32", 1e-6), size=0.0),
    "bfloat16": Case(ResidualNormShape(40, 256, "bfloat16", 1e-6)),
    "float16": Case(ResidualNormShape(40, 256, "float16", 1e-6)),
}


def inputs(case: Case, seed: int) -> list[torch.Tensor]:
    """Random tokens, what is added to them, gradients of both results, and the scale."""
    p, rng = case.shape, np.random.default_rng(seed)
    sizes = (case.size, case.size, 1.0, 1.0)
    draws = [size * rng.standard_normal((p.tokens, p.width), np.float32) for size in sizes]
    arrays = [torch.tensor(draw).to(DTYPES[p.dtype]) for draw in draws]
    return [*arrays, torch.tensor(rng.uniform(0.1, 2.0, p.width).astype(np.float32))]


def normed(case: Case, x, scale) -> torch.Tensor:
    """In float64, by the op's definition."""
    x, scale = x.double(), scale.double()
    return x / torch.sqrt(torch.mean(x * x, -1, keepdim=True) + case.shape.epsilon) * scale


def gradients(case: Case, d_around, d_normed, x, scale) -> tuple[torch.Tensor, ...]:
    """In float64, of the op's definition."""
    x, scale = x.double().requires_grad_(), scale.double().requires_grad_()
    return torch.autograd.grad((x, normed(case, x, scale)), (x, scale), (d_around.double(), d_normed.double()))


def errors(case: Case, seed: int = 0) -> dict[str, float]:
    """Norm of the error over norm of the float64 result, for every result and gradient."""
    x, added, d_around, d_normed, scale = inputs(case, seed)
    tiles = triton_tiling.tiles_of(case.shape) if case.tiles is None else case.tiles
    around, found = run(triton.forward_launch(case.shape), x, added, scale)
    d_x, d_scale = run(triton.backward_launch(case.shape, tiles), d_around, d_normed, x, scale)
    wanted_d_x, wanted_d_scale = gradients(case, d_around, d_normed, x, scale)
    pairs = {
        "around": (around, x.double() + added.double()),
        "normed": (found, normed(case, around, scale)),
        "d_x": (d_x, wanted_d_x),
        "d_scale": (d_scale.sum(0), wanted_d_scale),
    }
    return {name: float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for name, (a, b) in pairs.items()}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps({"case": name} | errors(CASES[name])), flush=True)
