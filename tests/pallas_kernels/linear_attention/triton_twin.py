"""What the tests of linear attention's Triton kernels share: a float64 reference and the launches over torch tensors.

Run as a program it is the interpreter test, of the cases in its arguments or all:
`TRITON_INTERPRET=1 python -m tests.pallas_kernels.linear_attention.triton_twin`.
"""

import dataclasses
import json
import sys

import numpy as np
import torch

from pallas_kernels.linear_attention import triton
from pallas_kernels.linear_attention.shape import LinearAttentionShape
from pallas_kernels.linear_attention.triton_tiling import Tiling
from tests.pallas_kernels.torch_launch import DTYPES, run
from tests.pallas_kernels.triton_interpreter import mend_interpreter


@dataclasses.dataclass(frozen=True)
class LinearCase:
    """How a call is cut, and the lengths of each row's documents."""

    tiling: Tiling
    lengths: tuple[tuple[int, ...], ...] = ()

    @property
    def documents(self) -> np.ndarray:
        rows = self.lengths or ((self.tiling.shape.tokens,),) * self.tiling.shape.batch
        return np.stack([np.repeat(np.arange(len(row)) * 2, row) for row in rows]).astype(np.int32)


def inputs(case: LinearCase, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random query, key, value and, if there is one, initial state; and the gradients of out and final state."""
    p = case.tiling.shape
    rng = np.random.default_rng(seed)
    dtype = DTYPES[p.dtype]

    def random(*shape, scale=1.0):
        return torch.tensor(rng.standard_normal(shape, np.float32) * scale)

    state = (2 * p.head_dim, p.head_dim)
    query = random(p.batch, p.tokens, p.num_heads, p.head_dim, scale=2.0)
    key, value = (random(p.batch, p.tokens, p.key_heads, p.head_dim, scale=scale) for scale in (2.0, 1.0))
    arrays = [x.to(dtype) for x in (query, key, value)]
    if p.initial_heads:
        arrays.append(random(p.initial_rows, p.initial_heads, *state).to(dtype))
    d_out = random(p.batch, p.tokens, p.num_heads, p.head_dim).to(dtype)
    return arrays, [d_out, random(p.batch, p.key_heads, *state)]


def features(p: LinearAttentionShape, x: torch.Tensor) -> torch.Tensor:
    """phi(x) by the definition."""
    m = torch.relu if p.feature_map == "relu" else lambda x: torch.softmax(x, dim=-1)
    return torch.cat([m(x), m(-x)], dim=-1)


def reference(case: LinearCase, query, key, value, initial=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and final state by the definition: all pairs of tokens."""
    p = case.tiling.shape
    documents = torch.tensor(case.documents, device=query.device)
    same = documents[:, :, None] == documents[:, None, :]
    seen = (torch.tril(torch.ones_like(same)) & same).to(query.dtype)
    key_features, query_features = features(p, key), features(p, query)
    heads = torch.arange(p.num_heads, device=query.device) // p.heads_per_key
    scores = torch.einsum("btnf,bsnf->bnts", query_features, key_features[:, :, heads]) * seen[:, None]
    out = torch.einsum("bnts,bsnh->btnh", scores, value[:, :, heads])
    if initial is not None:
        each = initial if p.initial_heads == p.num_heads else initial[:, heads]
        out = out + torch.einsum("btnf,bnfh->btnh", query_features, each.expand(p.batch, -1, -1, -1))
    last = (documents == documents[:, -1:]).to(query.dtype)
    return out, torch.einsum("bs,bskf,bskh->bkfh", last, key_features, value)


def twin(case: LinearCase, arrays, d_out, d_final):
    """The kernels' out, final state and gradients."""
    p = case.tiling.shape
    device = d_out.device
    query, key, value, *initial = arrays
    initial = initial[0] if initial else torch.zeros((1, 1, 1, 1), dtype=query.dtype, device=device)
    documents = torch.tensor(case.documents if p.segmented else np.zeros((1, 1), np.int32), device=device)
    out, final, states = triton.forward(run, case.tiling, query, key, value, initial, documents)
    gradients = triton.backward(run, case.tiling, states, query, key, value, d_out, d_final, initial, documents)
    return out, final, *gradients


def errors(case: LinearCase, seed: int = 0, device: str = "cpu") -> dict[str, float]:
    """Norm of the error over norm of the float64 result, for both results and every gradient."""
    arrays, d_results = inputs(case, seed)
    exact = [x.to(device).double().requires_grad_() for x in arrays]
    wanted = reference(case, *exact)
    gradients = torch.autograd.grad(wanted, exact, [x.to(device).double() for x in d_results])
    found = twin(case, [x.to(device) for x in arrays], *(x.to(device) for x in d_results))
    names = ["out", "final", "d_query", "d_key", "d_value", "d_initial"]
    pairs = zip(names, found, [*wanted, *gradients], strict=False)  # one gradient less without an initial state
    return {name: float((a.double() - b.detach()).norm() / b.detach().norm()) for name, a, b in pairs}


def tiling_of(
    batch,
    tokens,
    heads,
    key_heads,
    head_dim,
    dtype="float32",
    feature_map="softmax",
    segmented=False,
    sum_programs=512,
    **more,
) -> Tiling:
    sizes = (batch, tokens, heads, key_heads, head_dim, dtype, feature_map, segmented)
    return Tiling(LinearAttentionShape(*sizes, **more), sum_programs)


CASES = {
    "plain": LinearCase(tiling_of(1, 70, 2, 1, 16)),
    "relu": LinearCase(tiling_of(1, 40, 2, 1, 16, feature_map="relu")),
    "segments": LinearCase(tiling_of(1, 150, 1, 1, 16, sum_programs=4)),
    "segments_of_documents": LinearCase(
        tiling_of(2, 130, 2, 1, 16, "float32", "softmax", True, sum_programs=8), ((60, 30, 20, 20), (128, 2))
    ),
    "grouped_heads": LinearCase(tiling_of(1, 40, 6, 2, 20, initial_rows=1, initial_heads=6)),
    "float16": LinearCase(tiling_of(1, 100, 4, 2, 32, "float16", initial_rows=1, initial_heads=2)),
    "float16_relu": LinearCase(tiling_of(1, 130, 2, 1, 32, "float16", "relu")),
    "one_token": LinearCase(tiling_of(2, 1, 2, 2, 16)),
    "odd_head": LinearCase(tiling_of(2, 33, 2, 1, 7, feature_map="relu", initial_rows=1, initial_heads=1)),
    "two_column_tiles": LinearCase(tiling_of(1, 40, 2, 1, 48)),
    "documents": LinearCase(
        tiling_of(2, 100, 2, 1, 16, segmented=True, initial_rows=2, initial_heads=2), ((40, 2, 50, 1, 7), (32, 64, 4))
    ),
    "whole_rows": LinearCase(tiling_of(2, 140, 4, 1, 32, "float16", sum_programs=1)),
    "whole_rows_of_documents": LinearCase(
        tiling_of(2, 140, 4, 1, 20, "float16", "softmax", True, sum_programs=1), ((64, 50, 10, 16), (30, 110))
    ),
    "documents_relu": LinearCase(tiling_of(1, 97, 2, 1, 20, "float32", "relu", True), ((31, 1, 33, 32),)),
}


def main(names: list[str]) -> None:
    """Prints one JSON line of errors for every named case, all of them by default."""
    mend_interpreter()
    for name in names or CASES:
        print(json.dumps({"case": name, **errors(CASES[name])}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
