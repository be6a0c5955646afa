"""What tests of the convolved heads' Triton kernels share: a float64 reference and the launches over torch tensors.

Run as a program it is the interpreter test, of the cases in its arguments or all:
`TRITON_INTERPRET=1 python -m tests.pallas_kernels.convolved_heads.triton_twin`.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels.convolved_heads import triton
from pallas_kernels.convolved_heads.shape import LENGTH_EPSILON, ConvolvedHeadsShape
from pallas_kernels.convolved_heads.triton_tiling import Blocks, Tiling
from rat_jax.ops import convolved_heads_xla
from rat_jax.segments import from_segments, whole_rows
from tests.pallas_kernels.torch_launch import DTYPES, run
from tests.pallas_kernels.triton_interpreter import mend_interpreter

RESULTS = ("query", "key", "value", "d_projected", "d_taps")


@dataclasses.dataclass(frozen=True)
class Case:
    """How a call is cut, and the documents of its rows."""

    tiling: Tiling
    lengths: tuple[tuple[int, ...], ...] = ()  # of each row's documents; negative is padding

    @property
    def segment_ids(self) -> np.ndarray:
        """Of each row's tokens."""
        shape = self.tiling.shape
        rows = self.lengths or ((shape.tokens,),) * shape.batch
        ids = [[np.full(abs(n), i if n > 0 else 0) for i, n in enumerate(row, 1)] for row in rows]
        return np.stack([np.concatenate(row) for row in ids]).astype(np.int32)

    @property
    def positions(self) -> np.ndarray:
        """Of tokens in their documents; 0 of padding."""
        shape = self.tiling.shape
        rows = self.lengths or ((shape.tokens,),) * shape.batch
        return np.array([np.concatenate([np.arange(abs(n)) * (n > 0) for n in row]) for row in rows], np.int32)


def case(tokens: int, heads: int, key_dim: int, value_dim: int, taps: int = 4, dtype: str = "float32", **changes):
    """Of two rows."""
    blocks = {"of_forward": Blocks(32, 1, 4, span=16), "of_backward": Blocks(32, 1, 4, span=16)}
    blocks |= {name: changes.pop(name) for name in list(changes) if name.startswith("of_")}
    sizes = (2, tokens, heads, key_dim, value_dim, taps, dtype)
    return Case(Tiling(ConvolvedHeadsShape(*sizes, segmented="lengths" in changes), **blocks), **changes)


DOCUMENTS = ((1, 2, 3, 10, -4, 2, 6), (-3, 13, 1, 9, 2))  # borders of spans lie in some
CASES = {
    "whole": case(37, 3, 16, 32),
    "odd_sizes": case(19, 3, 5, 7, taps=3),
    "documents": case(28, 2, 12, 20, lengths=DOCUMENTS),
    "one_tap": case(18, 1, 16, 16, taps=1),
    "two_taps": case(28, 1, 8, 8, taps=2, lengths=DOCUMENTS),
    "one_token": case(1, 1, 16, 16),
    "wide_heads": case(20, 1, 64, 16),
    "chosen_blocks": case(70, 2, 16, 16, of_forward=None, of_backward=None),
    "float16": case(20, 1, 16, 16, dtype="float16"),
}


def inputs(case: Case, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random `projected` and taps, and the gradients of the three results."""
    p = case.tiling.shape
    draw = np.random.default_rng(seed)
    dtype = DTYPES[p.dtype]
    projected = torch.tensor(draw.standard_normal((p.batch, p.tokens, p.width))).to(dtype)
    taps = torch.tensor(draw.standard_normal((p.taps, p.width))).float()
    heads = (p.batch, p.tokens, p.num_heads)
    d_results = [
        torch.tensor(draw.standard_normal((*heads, size))).to(dtype) for size in (p.key_dim, p.key_dim, p.value_dim)
    ]
    return [projected, taps], d_results


def reference(case: Case, projected, taps) -> tuple[torch.Tensor, ...]:
    """The op token by token: queries, keys and values; padding reads itself alone."""
    p = case.tiling.shape
    ids = case.segment_ids
    rows = []
    for b in range(p.batch):
        row = []
        for t in range(p.tokens):
            convolved = projected[b, t] * taps[-1]
            for i in range(1, min(p.taps, t + 1)):
                if ids[b, t] == 0 or ids[b, t - i] != ids[b, t]:
                    break
                convolved = convolved + projected[b, t - i] * taps[-1 - i]
            row.append(convolved)
        rows.append(torch.stack(row))
    parts = torch.nn.functional.silu(torch.stack(rows)).split([p.key_width, p.key_width, p.value_width], -1)
    query, key, value = (part.unflatten(-1, (p.num_heads, -1)) for part in parts)
    query, key = (x / torch.sqrt((x * x).sum(-1, keepdim=True) + LENGTH_EPSILON) for x in (query, key))
    return query / p.key_dim**0.5, key, value


def wanted(case: Case, arrays, d_results) -> tuple[torch.Tensor, ...]:
    """Results and gradients in float64."""
    exact = [x.double().requires_grad_() for x in arrays]
    results = reference(case, *exact)
    return *results, *torch.autograd.grad(results, exact, [d.double() for d in d_results])


def errors(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, float]:
    """Norm of the error over norm of the float64 result, for every result and gradient."""
    arrays, d_results = inputs(case, seed)
    truth = wanted(case, arrays, d_results)
    arrays, d_results = ([x.to(device) for x in xs] for xs in (arrays, d_results))
    positions = torch.tensor(case.positions if case.tiling.shape.segmented else [[0]], dtype=torch.int32, device=device)
    found = triton.forward(run, case.tiling, *arrays, positions)
    return _relative((*found, *triton.backward(run, case.tiling, *arrays, positions, *d_results)), truth)


def errors_of_xla(case: Case, seed: int = 0) -> dict[str, float]:
    """The same of plain XLA."""
    p = case.tiling.shape
    arrays, d_results = inputs(case, seed)
    # NumPy has no bfloat16 of its own.
    inexact = [[jnp.asarray(x.float().numpy(), str(x.dtype)[6:]) for x in xs] for xs in (arrays, d_results)]
    segments = from_segments(jnp.asarray(case.segment_ids))[0] if p.segmented else whole_rows(p.batch, p.tokens)

    @jax.jit
    def run(arrays, d_results):
        def convolved(projected, taps):
            return convolved_heads_xla.convolve(projected, taps, segments, p.num_heads, p.key_dim)[:3]

        results, pull_back = jax.vjp(convolved, *arrays)
        return *results, *pull_back(tuple(d_results))

    found = [torch.tensor(np.asarray(x, np.float64)) for x in run(*inexact)]
    return _relative(found, wanted(case, arrays, d_results))


def _relative(found, truth) -> dict[str, float]:
    return {
        name: float((a.double().cpu() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))
        for name, a, b in zip(RESULTS, found, truth, strict=True)
    }


def main(names: list[str]) -> None:
    """Prints one JSON line of errors for every named case, all of them by default."""
    mend_interpreter()
    for name in names or CASES:
        print(json.dumps({"case": name, **errors(CASES[name])}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
