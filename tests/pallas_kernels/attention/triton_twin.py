"""What the tests of the Triton kernels share: a float64 reference, and the same launches over torch tensors.

Run as a program it is the interpreter test, `TRITON_INTERPRET=1 python -m tests.pallas_kernels.attention.triton_twin
CASE`: triton reads that variable when a kernel is defined, so the tests start a process for it.
"""

import dataclasses
import json
import math
import sys
from unittest import mock

import numpy as np
import torch

from pallas_kernels.attention import triton_decode, triton_decode_tiling
from pallas_kernels.attention.shape import AttentionShape
from tests.pallas_kernels.torch_launch import DTYPES, run
from tests.pallas_kernels.triton_interpreter import mend_interpreter

NOTHING = -0.99e30  # log-sum-exps of queries that see nothing are below, all others far above


@dataclasses.dataclass(frozen=True)
class Row:
    """The query of a row and what its cache holds; the query's own key is in it too."""

    index: int  # of the query
    document: int = 1  # of the query; 0 is padding
    first: int = 0  # index of the document's first token; those before it are of other documents


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call and its rows."""

    shape: AttentionShape
    num_keys: int
    rows: tuple[Row, ...]
    splits: int = 1
    is_ring: bool = False  # token t in slot t mod S; otherwise in slot t

    def places(self) -> tuple[np.ndarray, ...]:
        """Segments and indices of queries, [B, 1], and of keys, [B, S]; later tokens of the document lie behind."""
        slots = np.arange(self.num_keys)
        segments, indices = [], []
        for row in self.rows:
            held = row.index - (row.index - slots) % self.num_keys if self.is_ring else slots
            others = np.where(held < row.first, row.document + 1, row.document)
            # Where a document holds more than a few tokens one of them is padding: a token that was never there.
            segments.append(np.where((held < 0) | (held % 11 == 7), 0, others))
            indices.append(held)
        queries = [[row.document] for row in self.rows], [[row.index] for row in self.rows]
        return tuple(np.array(x, np.int32) for x in (*queries, segments, indices))

    def visible(self) -> np.ndarray:
        """[B, S], by the op's definition."""
        query_segments, query_index, segments, indices = self.places()
        distance = query_index - indices
        seen = (segments == query_segments) & (segments != 0) & (distance >= 0)
        return seen if self.shape.window is None else seen & (distance <= self.shape.window)

    def seen_slots(self) -> np.ndarray:
        """[2, B]: the first slot that is seen and the first one behind the last, one row after the other."""
        found = [np.flatnonzero(row) for row in self.visible()]
        return np.array([(slots[0], slots[-1] + 1) if len(slots) else (0, 0) for slots in found], np.int32).T


def inputs(case: Case, seed: int) -> list[torch.Tensor]:
    """Random queries, keys and values; those that are not seen are NaN, which must not get into a result."""
    p, rng = case.shape, np.random.default_rng(seed)
    query = 2 * rng.standard_normal((p.batch, 1, p.num_heads, p.head_dim), np.float32)
    keys = rng.standard_normal((2, p.batch, case.num_keys, p.key_heads, p.head_dim), np.float32)
    keys[:, ~case.visible()] = math.nan
    return [torch.tensor(x).to(DTYPES[p.dtype]) for x in (query, *keys)]


def reference(case: Case, query, key, value) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and log-sum-exp in float64, one row and head after the other; zero and -inf where nothing is seen."""
    p, visible = case.shape, torch.tensor(case.visible())
    out = torch.zeros(p.batch, 1, p.num_heads, p.head_dim, dtype=torch.float64)
    log_sum_exp = torch.full((p.batch, 1, p.num_heads), -math.inf, dtype=torch.float64)
    for b in range(p.batch):
        for n in range(p.num_heads):
            head = n // (p.num_heads // p.key_heads)
            keys, values = (x[b, visible[b], head].double() for x in (key, value))
            if len(keys):
                scores = keys @ query[b, 0, n].double() / math.sqrt(p.head_dim)
                out[b, 0, n] = torch.softmax(scores, 0) @ values
                log_sum_exp[b, 0, n] = torch.logsumexp(scores, 0)
    return out, log_sum_exp


def errors(case: Case, seed: int = 0) -> dict[str, float]:
    """Norm of the error over norm of the float64 result; of the rows that see nothing infinite unless they say so."""
    arrays = inputs(case, seed)
    wanted, wanted_sums = reference(case, *arrays)
    places = [torch.tensor(x) for x in (*case.places(), *case.seen_slots())]
    with mock.patch.object(triton_decode_tiling, "splits", lambda shape, num_keys: case.splits):
        out, sums = triton_decode.attend_by(run, case.shape, *arrays, *places)
    seeing = torch.tensor(case.visible().any(1))
    blind_is_told = not out[~seeing].any() and bool((sums[~seeing] < NOTHING).all() and sums.isfinite().all())
    pairs = {"out": (out[seeing], wanted[seeing]), "log_sum_exp": (sums[seeing], wanted_sums[seeing])}
    found = {name: float((a.double() - b).norm() / b.norm().clamp_min(1e-30)) for name, (a, b) in pairs.items()}
    return found if blind_is_told else dict.fromkeys(found, math.inf)


def shape_of(batch, heads, key_heads, head_dim, window=None, dtype="float32") -> AttentionShape:
    return AttentionShape(
        batch, 1, heads, key_heads, head_dim, dtype, window=window, own_keys=False, whole_rows=False, capability=None
    )


LAST, EARLY, BLIND = Row(149), Row(70, first=12), Row(40, document=0)
RING = (Row(149), Row(500, document=3), Row(1000, document=2, first=960), Row(20))
CASES = {
    "heads": Case(shape_of(3, 2, 2, 32), 150, (LAST, EARLY, BLIND)),
    "one_tile": Case(shape_of(2, 2, 1, 16), 16, (Row(15), Row(9, first=3))),
    "few_keys": Case(shape_of(3, 2, 1, 16), 5, (Row(4), Row(0), Row(3, first=4))),  # the last sees nothing
    "one_key": Case(shape_of(2, 1, 1, 16), 1, (Row(0), BLIND)),
    "padded_heads": Case(shape_of(2, 6, 2, 20), 150, (LAST, EARLY), splits=3),
    "many_heads": Case(shape_of(2, 40, 2, 8), 70, (Row(69), Row(30, first=9)), splits=2),  # 20 of a key head
    "splits": Case(shape_of(4, 2, 2, 16), 330, (Row(329), EARLY, BLIND, Row(329, first=128)), splits=3),
    "an_empty_split": Case(shape_of(2, 2, 1, 16), 300, (Row(299), Row(128)), splits=12),  # two tiles each
    "window_of_none": Case(shape_of(3, 2, 1, 16, window=0), 150, (LAST, EARLY, Row(7)), splits=2),  # 7 is padding
    "window": Case(shape_of(3, 4, 2, 16, window=50), 150, (LAST, EARLY, Row(30)), splits=2),
    "window_beyond_all": Case(shape_of(2, 2, 1, 16, window=1000), 150, (LAST, EARLY)),
    "ring": Case(shape_of(4, 4, 2, 16, window=100), 101, RING, splits=2, is_ring=True),
    "ring_without_window": Case(shape_of(4, 2, 2, 16), 130, RING, is_ring=True),
    "float16": Case(shape_of(3, 6, 2, 32, window=80, dtype="float16"), 150, (LAST, EARLY, BLIND), splits=2),
}


if __name__ == "__main__":
    mend_interpreter()
    for name in sys.argv[1:]:
        print(json.dumps({"case": name} | errors(CASES[name])), flush=True)
