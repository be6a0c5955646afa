"""What tests of the gated delta rule's Triton kernels share: a float64 reference and the launches over torch tensors.

Run as a program it is the interpreter test, of the cases in its arguments or all:
`TRITON_INTERPRET=1 python -m tests.pallas_kernels.gated_delta_rule.triton_twin`.
"""

import dataclasses
import functools
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels.gated_delta_rule import triton
from pallas_kernels.gated_delta_rule.shape import GatedDeltaRuleShape
from pallas_kernels.gated_delta_rule.triton_tiling import Blocks, Tiling
from rat_jax.ops import gated_delta_rule_xla
from tests.pallas_kernels.torch_launch import DTYPES, run
from tests.pallas_kernels.triton_interpreter import mend_interpreter

NAMES = ("query", "key", "value", "log_decay", "write_strength", "initial_state")


@dataclasses.dataclass(frozen=True)
class Case:
    """How a call is cut, and what its inputs look like."""

    tiling: Tiling
    starts: tuple[tuple[int, ...], ...] = ()  # of each row: its tokens that begin documents
    forgets: float = 0.0  # the part of tokens whose log decay is -1000
    one_key: bool = False  # all tokens write to one key, and keep what it holds


def case(
    tokens: int, heads: int, key_dim: int, value_dim: int, chunk_size: int = 16, dtype: str = "float32", **changes
) -> Case:
    """Of two rows that continue from a state."""
    blocks = {name: changes.pop(name) for name in list(changes) if name.startswith(("of_", "most_"))}
    sizes = (2, tokens, heads, key_dim, value_dim, chunk_size, dtype)
    shape = GatedDeltaRuleShape(*sizes, segmented="starts" in changes, continued=changes.pop("continued", True))
    return Case(Tiling(shape, **blocks, solve_precision="ieee"), **changes)  # which the interpreter knows


CASES = {
    "chunks": case(40, 2, 16, 32),
    "from_nothing": case(20, 1, 16, 16, continued=False),
    "odd_sizes": case(19, 2, 12, 20),
    "blocks": case(33, 1, 32, 40, of_gradients=Blocks(16, 4, 1), of_states=Blocks(16, 4, 1)),
    "parts_of_keys": case(20, 1, 32, 16, most_key_columns=16),
    "large_chunks": case(70, 1, 16, 16, chunk_size=64),
    "documents": case(50, 1, 12, 20, starts=((3, 20, 31, 32), (0, 16, 49))),
    "forgetful": case(50, 1, 16, 16, chunk_size=32, forgets=0.3),
    "forgetful_documents": case(50, 1, 16, 16, chunk_size=32, forgets=0.3, starts=((7, 31), ())),
    "one_key": case(64, 1, 16, 16, chunk_size=64, one_key=True),
    "one_token": case(1, 1, 16, 16),
    "float16": case(40, 1, 16, 32, chunk_size=32, dtype="float16"),
}


def inputs(case: Case, seed: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Random arrays in the order of `NAMES`, keys of length 1 among them, and the gradients of both results."""
    p = case.tiling.shape
    draw = np.random.default_rng(seed)
    dtype, rows = DTYPES[p.dtype], (p.batch, p.tokens, p.num_heads)
    key = draw.standard_normal((*rows, p.key_dim))
    decay = -np.exp(draw.standard_normal(rows) - 2)
    decay = np.where(draw.uniform(size=rows) < case.forgets, -1e3, decay)
    if case.one_key:
        key, decay = np.broadcast_to(key[:, :1], key.shape), np.zeros_like(decay)
    state = draw.standard_normal((p.batch, p.num_heads, p.key_dim, p.value_dim)) * p.continued
    arrays = [
        torch.tensor(draw.standard_normal((*rows, p.key_dim)) * p.key_dim**-0.5).to(dtype),
        torch.tensor(key / np.linalg.norm(key, axis=-1, keepdims=True)).to(dtype),
        torch.tensor(draw.standard_normal((*rows, p.value_dim))).to(dtype),
        torch.tensor(decay).float(),
        torch.tensor(2 * draw.uniform(size=rows)).float(),
        torch.tensor(state).float(),
    ]
    d_out = torch.tensor(draw.standard_normal((*rows, p.value_dim))).to(dtype)
    return arrays, [d_out, torch.tensor(draw.standard_normal(state.shape)).float()]


def starts_of(case: Case, device: str) -> torch.Tensor:
    p = case.tiling.shape
    starts = np.zeros((p.batch, p.tokens) if p.segmented else (1, 1), np.int32)
    for row, tokens in zip(starts, case.starts, strict=False):
        row[list(tokens)] = 1
    return torch.tensor(starts, device=device)


def reference(case: Case, query, key, value, log_decay, write_strength, state) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule token by token: what queries read, and the last state."""
    starts = starts_of(case, query.device).expand(query.shape[:2])
    out = []
    for t in range(query.shape[1]):
        kept = torch.exp(log_decay[:, t]) * (starts[:, t, None] == 0)
        state = kept[..., None, None] * state
        held = torch.einsum("bnk,bnkv->bnv", key[:, t], state)
        wrong = write_strength[:, t, :, None] * (value[:, t] - held)
        state = state + torch.einsum("bnk,bnv->bnkv", key[:, t], wrong)
        out.append(torch.einsum("bnk,bnkv->bnv", query[:, t], state))
    return torch.stack(out, 1), state


def errors(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, float]:
    """Norm of the error over norm of the float64 result, for both results and every gradient."""
    arrays, d_results = inputs(case, seed)
    arrays, d_results = ([x.to(device) for x in xs] for xs in (arrays, d_results))
    exact = [x.double().requires_grad_() for x in arrays]
    wanted = reference(case, *exact)
    gradients = torch.autograd.grad(wanted, exact, [x.double() for x in d_results])
    *of_tokens, state = arrays
    state = state if case.tiling.shape.continued else torch.zeros((1, 1, 1, 1), device=device)
    arguments = *of_tokens, starts_of(case, device), state
    found = *triton.forward(run, case.tiling, *arguments), *triton.backward(run, case.tiling, *arguments, *d_results)
    return _relative(found, (*wanted, *gradients))


def errors_of_xla(case: Case, seed: int = 0) -> dict[str, float]:
    """The same of plain XLA."""
    arrays, d_results = inputs(case, seed)
    exact = [x.double().requires_grad_() for x in arrays]
    wanted = reference(case, *exact)
    gradients = torch.autograd.grad(wanted, exact, [x.double() for x in d_results])
    # NumPy has no bfloat16 of its own.
    arrays, d_results = ([jnp.asarray(x.float().numpy(), str(x.dtype)[6:]) for x in xs] for xs in (arrays, d_results))
    starts = jnp.asarray(starts_of(case, "cpu").numpy()) == 1 if case.tiling.shape.segmented else None

    @jax.jit
    def run(*arrays):
        rule = functools.partial(gated_delta_rule_xla.rule, starts=starts, chunk_size=case.tiling.shape.chunk_size)
        results, pull_back = jax.vjp(lambda *arrays: tuple(rule(*arrays)), *arrays)
        return *results, *pull_back(tuple(d_results))

    return _relative([torch.tensor(np.asarray(x, np.float64)) for x in run(*arrays)], (*wanted, *gradients))


def _relative(found, wanted) -> dict[str, float]:
    names = "out", "final_state", *(f"d_{name}" for name in NAMES)
    return {
        name: float((a.double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))
        for name, a, b in zip(names, found, wanted, strict=True)
    }


def main(names: list[str]) -> None:
    """Prints one JSON line of errors for every named case, all of them by default."""
    mend_interpreter()
    for name in names or CASES:
        print(json.dumps({"case": name, **errors(CASES[name])}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
