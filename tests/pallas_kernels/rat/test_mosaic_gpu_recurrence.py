"""The Mosaic GPU kernel of RAT's backward recurrence: lowered for CUDA, emulated, and run on a Hopper GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rat import mosaic_gpu_recurrence_backward, mosaic_gpu_tiling
from pallas_kernels.rat.shape import RatShape
from pallas_kernels.rat.triton_rotation import rotation
from tests.pallas_kernels import mosaic_emulator

KERNEL = "rat_recurrence_backward_mosaic"
H = 128
CASES = {  # B, T, N, G, L, dtype, base of the rotation, what is added to the gates
    "plain": (2, 64, 4, 2, 16, "bfloat16", 10_000.0, 0.0),
    "ends-inside-a-chunk": (1, 28, 8, 2, 8, "bfloat16", 10_000.0, 0.0),
    "less-than-a-chunk": (1, 4, 2, 1, 16, "bfloat16", 10_000.0, 0.0),
    "several-programs-a-row": (1, 52, 8, 1, 4, "float16", 10_000.0, 0.0),
    "no-rotation": (1, 32, 2, 1, 16, "float16", None, 0.0),
    "gates-near-1": (1, 32, 2, 1, 16, "bfloat16", 10_000.0, 12.0),
    "gates-near-0": (1, 32, 2, 1, 16, "bfloat16", 10_000.0, -12.0),
}
LIMITS = {"bfloat16": 2.0**-8, "float16": 2.0**-11}  # the roundoff of results


def case_of(name: str) -> tuple[RatShape, tuple[jax.Array, ...]]:
    batch, tokens, heads, groups, chunk_size, dtype, base, shift = CASES[name]
    p = RatShape(batch, tokens, heads, groups, H, chunk_size, dtype, base, segmented=False)
    keys = iter(jax.random.split(jax.random.key(0), 9))
    rows, summaries = (batch, heads, tokens), (batch, p.num_chunks, heads, H)
    draw = functools.partial(jax.random.normal, dtype=jnp.dtype(dtype))
    return p, (
        draw(next(keys), (batch, tokens, p.projected_width)),
        shift + jax.random.normal(next(keys), (p.width,)),
        *rotation(jnp.arange(p.num_chunks), H, base),
        jax.random.uniform(next(keys), rows),
        jax.random.normal(next(keys), rows) / 8,
        draw(next(keys), (batch, tokens, heads, H)),
        jax.random.normal(next(keys), (batch, tokens, groups, H)),
        jax.random.normal(next(keys), summaries),
        jax.random.normal(next(keys), summaries),
        draw(next(keys), (batch, tokens, p.projected_width)),
    )


def truth(p: RatShape, arrays: tuple[jax.Array, ...]) -> dict[str, np.ndarray]:
    """Everything in float64 NumPy, token by token; dz as it came."""
    x = [np.asarray(array.astype(jnp.float32), np.float64) for array in arrays]
    projected, bias, cosines, sines, weights, d_scores, d_heads, d_queries, d_keys, d_values, d_projected = x
    heads, shared = (p.batch, p.tokens, p.num_heads, H), (p.batch, p.tokens, p.num_groups, H)
    ends = np.cumsum([p.width, p.width, p.width, p.num_groups * H])
    dz = d_projected[..., : p.width]
    v, gate = (projected[..., end - p.width : end].reshape(heads) for end in ends[1:3])
    group = np.arange(p.num_heads) % p.num_groups
    q, k = (part.reshape(shared)[:, :, group] for part in np.split(projected[..., ends[2] :], 2, axis=-1))

    def rotated_back(y, chunk):
        if p.rope_base is None:
            return y
        low, high = np.split(y, 2, axis=-1)
        cos, sin = cosines[chunk], sines[chunk]
        return np.concatenate([low * cos + high * sin, high * cos - low * sin], axis=-1)

    f = 1 / (1 + np.exp(-gate - bias.reshape(p.num_heads, H)))
    v_before, k_before, d_q = (np.zeros(heads) for _ in range(3))
    v_state = k_state = 0
    for t in range(p.tokens):
        if t % p.chunk_size == 0:
            v_state = k_state = np.zeros_like(v[:, 0])
        v_before[:, t], k_before[:, t] = v_state, k_state
        v_state, k_state = (f[:, t] * s + (1 - f[:, t]) * y[:, t] for s, y in ((v_state, v), (k_state, k)))
        d_q[:, t] = d_scores[:, :, t, None] * k_state
    d_v, d_k, d_gate = (np.zeros(heads) for _ in range(3))
    for t in reversed(range(p.tokens)):
        chunk = t // p.chunk_size
        if t % p.chunk_size == p.chunk_size - 1:
            d_v_state, d_k_state = d_values[:, chunk], rotated_back(d_keys[:, chunk], chunk)
        elif t == p.tokens - 1:
            d_v_state = d_k_state = 0
        d_v_state = d_v_state + weights[:, :, t, None] * d_heads[:, t]
        d_k_state = d_k_state + d_scores[:, :, t, None] * q[:, t]
        d_v[:, t], d_k[:, t] = (1 - f[:, t]) * d_v_state, (1 - f[:, t]) * d_k_state
        steps = d_v_state * (v_before[:, t] - v[:, t]) + d_k_state * (k_before[:, t] - k[:, t])
        d_gate[:, t] = f[:, t] * (1 - f[:, t]) * steps
        d_v_state, d_k_state = f[:, t] * d_v_state, f[:, t] * d_k_state
    turned = np.stack([rotated_back(d_queries[:, t], t // p.chunk_size) for t in range(p.tokens)], axis=1)
    d_q, d_k = (y.reshape(p.batch, p.tokens, p.heads_per_group, p.num_groups, H).sum(2) for y in (d_q, d_k))
    return {"dz": dz, "dv": d_v, "dg": d_gate, "dq": d_q + turned, "dk": d_k, "bias": d_gate.sum((0, 1))}


def check(name: str, run) -> None:
    p, arrays = case_of(name)
    assert mosaic_gpu_tiling.takes_backward_recurrence(p)
    found, d_bias = run(p, *arrays)
    want = truth(p, arrays)
    assert (found.shape, found.dtype) == (arrays[0].shape, arrays[0].dtype)
    ends = np.cumsum([p.width, p.width, p.width, p.num_groups * H])
    parts = np.split(np.asarray(found.astype(jnp.float32), np.float64), ends, axis=-1)
    got = dict(zip(("dz", "dv", "dg", "dq", "dk"), parts, strict=True)) | {"bias": np.asarray(d_bias).sum((0, 1))}
    np.testing.assert_array_equal(got["dz"], want["dz"])
    for part, value in want.items():
        error = np.linalg.norm(got[part].ravel() - value.ravel())
        limit = 1e-6 if part == "bias" else LIMITS[p.dtype]
        assert error <= limit * np.linalg.norm(value), (part, error, np.linalg.norm(value))  # false for NaN too


@pytest.mark.parametrize("name", CASES)
def test_emulated_values_are_those_of_float64(name, monkeypatch):
    mosaic_emulator.install(monkeypatch, seed=0, all_used=True)
    monkeypatch.setattr(mosaic_gpu_recurrence_backward, "CHUNKS", 3)
    check(name, mosaic_gpu_recurrence_backward.backward)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_float64(hopper, name):
    check(name, jax.jit(mosaic_gpu_recurrence_backward.backward, static_argnums=0))


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_lowers_for_cuda_and_overwrites_its_argument(name):
    p, arrays = case_of(name)
    traced = jax.jit(functools.partial(mosaic_gpu_recurrence_backward.backward, p)).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert KERNEL in text and "output_operand_alias" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"segmented": True},
        {"head_dim": 64},
        {"chunk_size": 20},
        {"chunk_size": 10},
        {"tokens": 66},
        {"num_groups": 4},  # 64 bytes of scores a chunk
        {"num_heads": 130, "num_groups": 2},
    ],
)
def test_other_calls_are_left_to_triton(changes):
    assert not mosaic_gpu_tiling.takes_backward_recurrence(dataclasses.replace(case_of("plain")[0], **changes))
