"""What the tests of the Triton kernels share: a float64 reference, and the same launches over torch tensors.

Run as a program it is the interpreter test, `TRITON_INTERPRET=1 python -m tests.pallas_kernels.rnn.triton_twin CASE`:
triton reads that variable when a kernel is defined, so the tests start a process for it.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator

import numpy as np
import torch

from pallas_kernels.rnn import triton
from pallas_kernels.rnn.shape import RnnShape
from tests.pallas_kernels.torch_launch import DTYPES, run


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call and what its inputs look like."""

    shape: RnnShape
    span: int
    lengths: tuple[tuple[int, ...], ...] = ()  # of each row's documents; negative is padding
    gate_shift: float = 0.0
    continued: bool = False  # an initial state, which each row's first document goes on from

    @property
    def kinds(self) -> np.ndarray:
        """Of `rnn_forward`."""
        kinds = np.zeros((self.shape.batch, self.shape.tokens), np.int32)
        for row, lengths in zip(kinds, self.lengths, strict=False):
            place = 0
            for length in lengths:
                row[place : place + abs(length)] = 0 if length > 0 else 2
                if length > 0 and not (self.continued and place == 0):
                    row[place] = 1
                place += abs(length)
            assert place == self.shape.tokens
        return kinds


def case(tokens: int, width: int, span: int, dtype: str = "float32", **changes) -> Case:
    """Of two rows."""
    return Case(RnnShape(2, tokens, width, dtype, segmented="lengths" in changes), span, **changes)


CASES = {
    "one_span": case(40, 24, 48),
    "spans": case(75, 130, 32),
    "one_token": case(1, 8, 16),
    "near_one": case(64, 8, 32, gate_shift=8.0),
    "near_zero": case(64, 8, 32, gate_shift=-8.0),
    "packed": case(50, 24, 16, lengths=((20, 1, -9, 20), (-5, 45))),
    "continued": case(50, 24, 16, lengths=((20, -9, 21), (50,)), continued=True),
    "bfloat16": case(60, 16, 32, "bfloat16"),
}


def inputs(case: Case, seed: int) -> Iterator[torch.Tensor]:
    """Random `projected`, `gate_bias`, `d_out` and initial state."""
    p, rng = case.shape, np.random.default_rng(seed)
    projected = rng.standard_normal((p.batch, p.tokens, 3 * p.width), np.float32)
    projected[..., 2 * p.width :] += case.gate_shift
    yield torch.tensor(projected).to(DTYPES[p.dtype])
    yield torch.tensor(rng.standard_normal(p.width, np.float32))
    yield torch.tensor(rng.standard_normal((p.batch, p.tokens, p.width), np.float32)).to(DTYPES[p.dtype])
    state = rng.standard_normal((p.batch, p.width), np.float32)
    yield torch.tensor(state if case.continued else np.zeros_like(state))


def reference(case: Case, projected, gate_bias, state) -> tuple[torch.Tensor, torch.Tensor]:
    """The op in float64, token by token, by the definition, and the last state."""
    z, value, gate = projected.split(case.shape.width, dim=-1)
    forget = torch.sigmoid(gate + gate_bias)
    kinds, out = torch.tensor(case.kinds), []
    for t in range(case.shape.tokens):
        begins, is_padding = (kinds[:, t, None] == kind for kind in (1, 2))
        before = torch.where(begins, 0.0, state)
        taken = forget[:, t] * before + (1 - forget[:, t]) * value[:, t]
        state = torch.where(is_padding, state, taken)
        out.append(torch.sigmoid(z[:, t]) * state)
    return torch.stack(out, 1), state


def errors(case: Case, seed: int = 0) -> dict[str, float]:
    """Norm of the error over norm of the float64 result, for out, last state and every gradient."""
    p = case.shape
    projected, gate_bias, d_out, state = inputs(case, seed)
    exact = projected.double().requires_grad_(), gate_bias.double().requires_grad_()
    wanted, wanted_state = reference(case, *exact, state.double())
    d_wanted = torch.autograd.grad(wanted, exact, d_out.double())
    kinds = torch.tensor(case.kinds) if p.segmented else None
    first = state if case.continued else None
    out, pieces, last = triton.forward(run, p, projected, gate_bias, kinds, first, case.span, arrays=torch)
    found = triton.backward(run, p, pieces, projected, gate_bias, d_out, kinds, case.span, arrays=torch)
    pairs = {"out": (out, wanted), "state": (last, wanted_state), "d_bias": (found[1].sum((0, 1)), d_wanted[1])}
    for name, a, b in zip("zvg", found[0].split(p.width, -1), d_wanted[0].split(p.width, -1), strict=True):
        pairs[f"d_{name}"] = a, b
    return {
        name: float((a.double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))
        for name, (a, b) in pairs.items()
    }


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps({"case": name} | errors(CASES[name])), flush=True)
