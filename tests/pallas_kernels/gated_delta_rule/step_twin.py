"""What the tests of the gated delta rule's step share: its inputs, and the launch over torch tensors.

Run as a program it is the interpreter test, of the cases in its arguments:
`TRITON_INTERPRET=1 python -m tests.pallas_kernels.gated_delta_rule.step_twin CASE`.
"""

import itertools
import json
import math
import sys

import torch

from pallas_kernels.gated_delta_rule.shape import GatedDeltaRuleShape
from pallas_kernels.gated_delta_rule.triton_step import step_launch
from pallas_kernels.gated_delta_rule.triton_tiling import Tiling
from tests.pallas_kernels.gated_delta_rule import triton_twin
from tests.pallas_kernels.torch_launch import run

ROWS = ("goes_on", "begins", "padding")
LOG_DECAYS = (0.0, None, -1e3)  # None: ordinary ones, of each head its own; the last forgets everything


def shape_of(heads, key_dim, value_dim, dtype="float32", rows=9, **changes):
    """Of one token a row that continues a state; 9 rows have each of `ROWS` with each of `LOG_DECAYS`."""
    sizes = {"tokens": 1, "chunk_size": 64, "continued": True} | changes
    return GatedDeltaRuleShape(
        batch=rows, num_heads=heads, key_dim=key_dim, value_dim=value_dim, dtype=dtype, segmented=True, **sizes
    )


CASES = {
    f"{heads}_{key_dim}_{value_dim}_{dtype}": shape_of(heads, key_dim, value_dim, dtype)
    for heads, (key_dim, value_dim), dtype in itertools.product(
        (1, 3), ((8, 20), (40, 70), (64, 128)), ("float32", "float16")
    )
}


def inputs(p: GatedDeltaRuleShape, seed: int, device: str) -> list[torch.Tensor]:
    """In the order of the kernel; rows are in turn those of `ROWS`, each with one of `LOG_DECAYS` after the other.

    The state before a document that begins is NaN, so that a trace of it shows.
    """
    arrays, _ = triton_twin.inputs(triton_twin.Case(Tiling(p)), seed)
    query, key, value, log_decay, write_strength, state = arrays
    row = torch.arange(p.batch)
    kind, decay = row % len(ROWS), row // len(ROWS) % len(LOG_DECAYS)
    for i, given in enumerate(LOG_DECAYS):
        if given is not None:
            log_decay[decay == i] = given
    begins, is_padding = (kind == ROWS.index(name) for name in ("begins", "padding"))
    log_decay[is_padding], write_strength[is_padding] = 0.0, 0.0
    state[begins] = math.nan
    arrays = query, key, value, log_decay, write_strength, (~begins).to(torch.int32), state
    return [x.to(device) for x in arrays]


def errors(p: GatedDeltaRuleShape, seed: int = 0, device: str = "cpu") -> dict[str, float]:
    """Norm of the error over norm of the float64 result, of both results; and the change of the state by padding."""
    *of_tokens, goes_on, state = inputs(p, seed, device)
    before = torch.where(goes_on.bool()[:, None, None, None], state, 0.0)
    no_starts = triton_twin.Case(Tiling(p))
    wanted = triton_twin.reference(no_starts, *(x.double() for x in (*of_tokens, before)))
    found = run(step_launch(p), *of_tokens, goes_on, state)
    assert found[1] is state  # in place
    padding = slice(ROWS.index("padding"), None, len(ROWS))
    pairs = zip(("out", "state"), found, wanted, strict=True)
    relative = {name: float((a.double() - b).norm() / b.norm()) for name, a, b in pairs}
    return relative | {"by_padding": float((state[padding] - before[padding]).abs().max())}


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps({"case": name} | errors(CASES[name])), flush=True)
