"""What the tests of linear attention's step share: a float64 reference and the launch over torch tensors.

Run as a program it is the interpreter test, of the cases in its arguments:
`TRITON_INTERPRET=1 python -m tests.pallas_kernels.linear_attention.step_twin CASE`.
"""

import dataclasses
import json
import math
import sys

import numpy as np
import torch

from pallas_kernels.linear_attention.shape import LinearAttentionShape
from pallas_kernels.linear_attention.triton_step import step_launch
from tests.pallas_kernels.linear_attention.triton_twin import features
from tests.pallas_kernels.torch_launch import DTYPES, run

ROWS = ("goes_on", "begins", "padding")


def shape_of(heads, key_heads, head_dim, dtype="float32", feature_map="softmax", rows=3, **initial):
    """Of one token a row that continues a state."""
    return LinearAttentionShape(rows, 1, heads, key_heads, head_dim, dtype, feature_map, continued=True, **initial)


CASES = {
    "plain": shape_of(2, 2, 8),
    "odd_head": shape_of(3, 1, 20, initial_rows=1, initial_heads=1),
    "relu": shape_of(6, 2, 20, feature_map="relu", initial_rows=3, initial_heads=6),
    "two_column_tiles": shape_of(8, 2, 64, initial_rows=3, initial_heads=8),
    "relu_without_initial_state": shape_of(4, 1, 64, feature_map="relu"),
    "one_initial_state": shape_of(8, 2, 8, feature_map="relu", initial_rows=1, initial_heads=2),
    "initial_states_of_heads": shape_of(6, 2, 8, initial_rows=1, initial_heads=6),
    "initial_states_of_rows": shape_of(2, 2, 20, initial_rows=3, initial_heads=2),
    "wide_head": shape_of(3, 1, 100, initial_rows=1, initial_heads=1),
    "float16": shape_of(6, 2, 64, "float16", initial_rows=1, initial_heads=2),
    "float16_relu": shape_of(8, 2, 20, "float16", "relu", initial_rows=3, initial_heads=8),
    "float16_plain": shape_of(2, 2, 8, "float16"),
}


@dataclasses.dataclass(frozen=True)
class Arrays:
    """What a step reads; the rows are in turn those of `ROWS`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    goes_on: torch.Tensor
    initial: torch.Tensor | None
    state: torch.Tensor

    @classmethod
    def random(cls, p: LinearAttentionShape, seed: int, device: str) -> "Arrays":
        """The value of padding is 0; the state before a document that begins is NaN, so that a trace of it shows."""
        rng = np.random.default_rng(seed)

        def random(*shape, scale=1.0):
            return torch.tensor(rng.standard_normal(shape, np.float32) * scale, device=device)

        matrix = (2 * p.head_dim, p.head_dim)
        kinds = [ROWS[row % len(ROWS)] for row in range(p.batch)]
        begins, is_padding = (torch.tensor([x == kind for x in kinds]) for kind in ("begins", "padding"))
        query = random(p.batch, 1, p.num_heads, p.head_dim, scale=2.0)
        key, value = (random(p.batch, 1, p.key_heads, p.head_dim, scale=scale) for scale in (2.0, 1.0))
        state = random(p.batch, p.key_heads, *matrix)
        value[is_padding], state[begins] = 0.0, math.nan
        initial = random(p.initial_rows, p.initial_heads, *matrix) if p.initial_heads else None
        arrays = (x.to(DTYPES[p.dtype]) for x in (query, key, value))
        return cls(*arrays, (~begins).to(torch.int32).to(device), initial, state)


def reference(p: LinearAttentionShape, arrays: Arrays) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and state in float64, by the op's definition."""
    query, key, value = (x[:, 0].double() for x in (arrays.query, arrays.key, arrays.value))
    added = torch.einsum("bkf,bkh->bkfh", features(p, key), value)
    before = torch.where(arrays.goes_on.bool()[:, None, None, None], arrays.state.double(), 0.0)
    state = before + added
    read = state.repeat_interleave(p.heads_per_key, dim=1)
    if arrays.initial is not None:
        read = read + arrays.initial.double().repeat_interleave(p.num_heads // p.initial_heads, dim=1)
    return torch.einsum("bnf,bnfh->bnh", features(p, query), read)[:, None], state


def errors(p: LinearAttentionShape, seed: int = 0, device: str = "cpu") -> dict[str, float]:
    """Norm of the error over norm of the float64 result, of both results; and the change of the state by padding."""
    arrays = Arrays.random(p, seed, device)
    wanted = reference(p, arrays)
    initial = arrays.value if arrays.initial is None else arrays.initial
    given, state = (arrays.query, arrays.key, arrays.value, arrays.goes_on, initial), arrays.state.clone()
    found = run(step_launch(p), *given, state)
    assert found[1] is state  # in place
    padding = slice(ROWS.index("padding"), None, len(ROWS))
    pairs = zip(("out", "state"), found, wanted, strict=True)
    relative = {name: float((a.double() - b).norm() / b.norm()) for name, a, b in pairs}
    return relative | {"by_padding": float((state[padding] - arrays.state[padding]).abs().max())}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps({"case": name} | errors(CASES[name])), flush=True)
