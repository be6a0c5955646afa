"""What the tests of the Triton kernels share: a float64 reference, and the same launches over torch tensors.

Run as a program it is the interpreter test, `TRITON_INTERPRET=1 python -m tests.pallas_kernels.rat.triton_twin CASE`:
triton reads that variable when a kernel is defined, so the tests start a process for it.
"""

import dataclasses
import json
import math
import sys
from unittest import mock

import jax.numpy as jnp
import numpy as np
import torch

from pallas_kernels.rat import triton, triton_decode, triton_recurrence_backward
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.state import State
from pallas_kernels.rat.triton_rotation import rotation
from pallas_kernels.rat.triton_segments import Documents, documents_of
from rat_jax.segments import SegmentInfo
from tests.pallas_kernels.torch_launch import DTYPES, run
from tests.pallas_kernels.triton_interpreter import mend_interpreter

ROPE_BASE = 10_000.0


@dataclasses.dataclass(frozen=True)
class Case:
    """The sizes of a call and what its inputs look like."""

    shape: RatShape
    lengths: tuple[tuple[int, ...], ...] = ()  # of each row's documents; negative is padding
    gate_shift: float = 0.0
    program_tokens: int = triton_recurrence_backward.PROGRAM_TOKENS  # of the backward recurrence

    @property
    def segment_ids(self) -> np.ndarray:
        rows = []
        for row in self.lengths:
            ids = [np.full(abs(n), 0 if n < 0 else i + 1) for i, n in enumerate(row)]
            rows.append(np.concatenate(ids))
        return np.stack(rows).astype(np.int32)

    @property
    def positions(self) -> np.ndarray:
        return np.stack([np.concatenate([np.arange(abs(n)) for n in row]) for row in self.lengths]).astype(np.int32)


def inputs(case: Case, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random `projected`, `gate_bias` and `d_out`."""
    p = case.shape
    rng = np.random.default_rng(seed)
    projected = rng.standard_normal((p.batch, p.tokens, p.projected_width), np.float32)
    projected[..., 2 * p.width : 3 * p.width] += case.gate_shift
    gate_bias = rng.standard_normal(p.width).astype(np.float32)
    d_out = rng.standard_normal((p.batch, p.tokens, p.width), np.float32)
    dtype = DTYPES[p.dtype]
    return torch.tensor(projected).to(dtype), torch.tensor(gate_bias), torch.tensor(d_out).to(dtype)


def reference(case: Case, projected, gate_bias) -> torch.Tensor:
    """The op in float64, token by token, by the definition; padding gives zero."""
    p = case.shape
    n, g, h, d = p.num_heads, p.num_groups, p.head_dim, p.width
    z, v, gate, q, k = torch.split(projected, [d, d, d, g * h, g * h], dim=-1)
    forget = torch.sigmoid(gate + gate_bias)
    group = torch.arange(n) % g
    rows = []
    for b in range(p.batch):
        segments = case.segment_ids[b] if p.segmented else np.ones(p.tokens, int)
        positions = case.positions[b] if p.segmented else np.arange(p.tokens)
        out, keys, values, document = [], [], [], None
        for t in range(p.tokens):
            if segments[t] == 0:
                out.append(torch.zeros(d, dtype=projected.dtype))
                continue
            if segments[t] != document:
                document, keys, values = segments[t], [], []
            chunk, place = divmod(int(positions[t]), p.chunk_size)
            if place == 0:
                k_state = v_state = torch.zeros(n, h, dtype=projected.dtype)
            f = forget[b, t].reshape(n, h)
            v_state = f * v_state + (1 - f) * v[b, t].reshape(n, h)
            k_state = f * k_state + (1 - f) * k[b, t].reshape(g, h)[group]
            query = q[b, t].reshape(g, h)[group]
            scores = [(query * k_state).sum(-1)]
            turned = turn(query, chunk, p.rope_base) if p.rope else query
            scores += [(turned * key).sum(-1) for key in keys]
            weights = torch.softmax(torch.stack(scores) / math.sqrt(h), dim=0)
            mixed = sum(w[:, None] * x for w, x in zip(weights, [v_state, *values], strict=True))
            out.append(torch.sigmoid(z[b, t]) * mixed.reshape(-1))
            if place == p.chunk_size - 1:
                keys.append(turn(k_state, chunk, p.rope_base) if p.rope else k_state)
                values.append(v_state)
        rows.append(torch.stack(out))
    return torch.stack(rows)


def turn(x: torch.Tensor, index: int, base: float) -> torch.Tensor:
    """RoPE by the angle of one index."""
    half = x.shape[-1] // 2
    angle = index * base ** (-torch.arange(half, dtype=x.dtype) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def twin(case: Case, projected, gate_bias, d_out):
    """The kernels' out, d_projected and d_gate_bias."""
    p = case.shape
    device = projected.device

    def tensor(x):
        return torch.tensor(np.array(x), device=device)

    tables = [tensor(x) for x in triton._angles(p)]
    ids = (jnp.asarray(case.segment_ids), jnp.asarray(case.positions)) if p.segmented else (None, None)
    documents = documents_of(p, *ids)
    arrays = [tensor(getattr(documents, f.name)) for f in dataclasses.fields(documents) if f.name != "seen"]
    documents = Documents(*arrays, seen=None)
    out, residuals = triton.forward(run, p, projected, gate_bias, tables, documents)
    if p.segmented:  # other back ends multiply them all, some by zero
        assert residuals.summary_keys.isfinite().all() and residuals.summary_values.isfinite().all()
    d_projected, d_bias = triton.backward(run, p, residuals, projected, gate_bias, d_out, tables, documents)
    return out, d_projected, d_bias.sum((0, 1))


def errors(case: Case, seed: int = 0, device: str = "cpu") -> dict[str, float]:
    """Norm of the error over norm of the float64 result, for out and every gradient."""
    p = case.shape
    projected, gate_bias, d_out = inputs(case, seed)
    exact = projected.double().requires_grad_(), gate_bias.double().requires_grad_()
    wanted = reference(case, *exact)
    wanted_gradients = torch.autograd.grad(wanted, exact, d_out.double())
    with mock.patch.object(triton_recurrence_backward, "PROGRAM_TOKENS", case.program_tokens):
        got = twin(case, projected.to(device), gate_bias.to(device), d_out.to(device))
    widths = [p.width] * 3 + [p.num_groups * p.head_dim] * 2
    pairs = {"out": (got[0], wanted), "d_bias": (got[2], wanted_gradients[1])}
    for name, a, b in zip("zvgqk", got[1].split(widths, -1), wanted_gradients[0].split(widths, -1), strict=True):
        pairs[f"d_{name}"] = a, b
    return {
        name: float((a.double().cpu() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))
        for name, (a, b) in pairs.items()
    }


def decode_error(case: Case, capacity: int, seed: int = 0, device: str = "cpu") -> float:
    """Error of decoding token by token from an empty cache; the last row takes every third step off."""
    p = dataclasses.replace(case.shape, tokens=1)
    projected, gate_bias, _ = inputs(case, seed)
    wanted = reference(case, projected.double(), gate_bias.double())
    all_positions = case.positions if p.segmented else np.arange(case.shape.tokens)[None].repeat(p.batch, 0)
    state = (p.batch, p.num_heads, p.head_dim)
    slots = (p.batch, capacity, p.num_heads, p.head_dim)
    cache = [torch.full(state, math.nan, device=device) for _ in range(2)]
    cache += [torch.full(slots, math.nan, device=device, dtype=projected.dtype) for _ in range(2)]
    done = np.zeros(p.batch, np.int32)
    rows = np.arange(p.batch)
    out = torch.zeros(wanted.shape, dtype=torch.float64)
    count = 0
    while done.min() < case.shape.tokens:
        is_token = done < case.shape.tokens
        is_token[-1] &= count % 3 != 2
        now = np.minimum(done, case.shape.tokens - 1)
        positions = np.where(is_token, all_positions[rows, now], 0).astype(np.int32)
        token = projected[rows, now][:, None].contiguous().to(device)
        turns = rotation(jnp.asarray(positions // p.chunk_size), p.head_dim, p.rope_base)
        tables = [torch.tensor(np.array(x), device=device) for x in turns]
        first_slots = np.where(is_token, (done - positions) // p.chunk_size, 0).astype(np.int32)
        places = [torch.tensor(x, device=device) for x in (positions, first_slots, is_token.astype(np.int32))]
        y, *cache = triton_decode.step(run, p, token, gate_bias.to(device), tables, *places, tuple(cache))
        for b in range(p.batch):
            if is_token[b]:
                out[b, done[b]] = y[b, 0].double().cpu()
            else:
                assert not y[b].any()
        done = done + is_token
        count += 1
    return float((out - wanted).norm() / wanted.norm())


def run_on_jax(launch, *arrays):
    """`run` for JAX arrays on the CPU."""
    tensors = [torch.tensor(np.array(x)) for x in arrays]
    return tuple(jnp.asarray(x.numpy()) for x in run(launch, *tensors))


def extend_error(case: Case, capacity: int, parts: tuple[int, ...], seed: int = 0) -> float:
    """Error of reading the rows part by part into a cache of NaN."""
    p = case.shape
    projected, gate_bias, _ = inputs(case, seed)
    wanted = reference(case, projected.double(), gate_bias.double())
    ids = case.segment_ids if p.segmented else np.ones((p.batch, p.tokens), np.int32)
    positions = case.positions if p.segmented else np.arange(p.tokens, dtype=np.int32)[None].repeat(p.batch, 0)
    state = jnp.full((p.batch, p.num_heads, p.head_dim), jnp.nan)
    slots = jnp.full((p.batch, capacity, p.num_heads, p.head_dim), jnp.nan)
    cache = State(state, state, slots, slots)
    index = np.cumsum(ids != 0, axis=1, dtype=np.int32) - 1
    out, start = [], 0
    for size in parts:
        part = slice(start, start + size)
        segments = SegmentInfo(*(jnp.asarray(x[:, part]) for x in (ids, positions, index)), contiguous=False)
        places = (segments.segment_ids, segments.positions, segments.first_slots(p.chunk_size))
        places += (segments.held(capacity, p.chunk_size),)
        sizes = dataclasses.replace(p, tokens=size, segmented=True, continued=True)
        arrays = (jnp.asarray(projected[:, part].numpy()), jnp.asarray(gate_bias.numpy()))
        y, cache = triton.extend(run_on_jax, sizes, *arrays, cache, *places)
        out.append(np.where(ids[:, part, None] != 0, y, 0))
        start += size
    found = torch.tensor(np.concatenate(out, axis=1)).double()
    return float((found - wanted).norm() / wanted.norm())


def shape_of(batch, tokens, heads, groups, head_dim, chunk, dtype="float32", rope=True, segmented=False) -> RatShape:
    return RatShape(batch, tokens, heads, groups, head_dim, chunk, dtype, ROPE_BASE if rope else None, segmented)


CASES = {
    "plain": Case(shape_of(1, 35, 4, 2, 16, 4)),
    "float16": Case(shape_of(1, 30, 4, 2, 32, 4, "float16")),  # the interpreter multiplies no bfloat16 matrices
    "odd_sizes": Case(shape_of(2, 23, 3, 1, 20, 5)),
    "no_rope_odd_head": Case(shape_of(1, 23, 2, 1, 7, 3, rope=False)),
    "one_token": Case(shape_of(2, 1, 2, 2, 16, 16)),
    "chunk_of_one": Case(shape_of(1, 70, 2, 1, 16, 1)),
    "long_chunk": Case(shape_of(1, 60, 2, 1, 16, 25)),
    "one_chunk": Case(shape_of(1, 20, 2, 1, 16, 20)),
    "gates_open": Case(shape_of(1, 18, 2, 1, 16, 4), gate_shift=8.0),
    "gates_shut": Case(shape_of(1, 18, 2, 1, 16, 4), gate_shift=-8.0),
    "documents": Case(
        shape_of(2, 20, 2, 1, 16, 3, segmented=True), ((7, 2, 10, 1), (-2, 8, -3, 5, -2)), program_tokens=3
    ),
    # Chunks in two pieces, some over the programs' borders; documents shorter than a chunk; padding around.
    "long_chunk_documents": Case(
        shape_of(1, 45, 2, 1, 16, 17, segmented=True), ((-2, 24, -1, 17, 1),), program_tokens=17
    ),
    # A document begins at every place of a block, and none; padding too.
    "borders_everywhere": Case(
        shape_of(9, 9, 1, 1, 2, 3, segmented=True),
        (*((i, 9 - i) for i in range(1, 9)), (-1, 2, -3, 2, -1)),
        program_tokens=6,
    ),
    "documents_over_programs": Case(shape_of(1, 17, 2, 2, 4, 3, segmented=True), ((1, 7, -1, 2, 6),), program_tokens=6),
}


DECODE_CASES = {
    "decode": (Case(shape_of(2, 7, 4, 2, 16, 2)), 4),
    "decode_split": (Case(shape_of(1, 9, 2, 1, 12, 1)), 260),
    "decode_documents": (Case(shape_of(2, 9, 4, 2, 8, 2, segmented=True), ((3, 2, 4), (1, 7, 1))), 6),
    "decode_odd_head": (Case(shape_of(2, 7, 2, 1, 7, 3, rope=False)), 3),
}


EXTEND_CASES = {
    # Parts that begin at a chunk, in it and at its end; those of one size share their compiled places.
    "extend": (Case(shape_of(1, 22, 4, 2, 16, 4)), 6, (7, 1, 7, 7)),
    "extend_documents": (
        Case(shape_of(2, 20, 2, 1, 16, 3, segmented=True), ((7, 2, 10, 1), (-2, 8, -3, 5, -2))),
        7,
        (5, 5, 10),
    ),
    "extend_odd_head": (Case(shape_of(1, 12, 2, 1, 7, 5, rope=False)), 2, (12,)),
}


def main(names: list[str]) -> None:
    """Prints one JSON line of errors for every named case, all of them by default."""
    mend_interpreter()
    for name in names or [*CASES, *DECODE_CASES, *EXTEND_CASES]:
        if name in CASES:
            found = errors(CASES[name])
        elif name in DECODE_CASES:
            found = {"out": decode_error(*DECODE_CASES[name])}
        else:
            found = {"out": extend_error(*EXTEND_CASES[name])}
        print(json.dumps({"case": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
