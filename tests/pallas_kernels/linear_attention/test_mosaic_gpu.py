"""Linear attention's Mosaic GPU kernels: lowered for CUDA, emulated on any machine, and run on a Hopper GPU.

The interpreter of Mosaic GPU does not run them; `mosaic_emulator` does, in an order of warpgroups and copies that is
drawn, so that values are compared with float64 without a GPU too, and what no order of events allows is found.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.launch import mosaic_gpu as launch
from pallas_kernels.linear_attention import mosaic_gpu, mosaic_gpu_blocks, mosaic_gpu_tiling
from pallas_kernels.linear_attention.shape import LinearAttentionShape
from rat_jax.ops import linear_attention_xla
from tests.pallas_kernels import mosaic_emulator
from tests.pallas_kernels.mosaic_machine import Fault

KERNELS = [f"linear_attention_{name}_mosaic" for name in ("sums", "outputs", "queries", "keys")]
CASES = {  # B, T, N, K, H, dtype, feature map, key_lag
    "plain": (2, 1024, 4, 2, 128, "bfloat16", "softmax", 513),
    "no_delay": (1, 600, 3, 1, 64, "bfloat16", "softmax", 0),
    "any_delay": (2, 304, 4, 2, 128, "bfloat16", "softmax", 70),
    "relu": (2, 300, 2, 2, 64, "float16", "relu", 5),
    "short": (3, 40, 2, 1, 64, "bfloat16", "softmax", 1),
    "nothing_seen": (1, 130, 2, 1, 64, "bfloat16", "softmax", 200),
    "segments": (1, 3000, 2, 1, 128, "float16", "softmax", 65),
    "whole_rows": (70, 300, 4, 2, 64, "bfloat16", "softmax", 65),
}
SMALL = (1, 304, 2, 1, 64, "bfloat16", "softmax", 65)
EMULATED = (
    {name: CASES[name] for name in ("no_delay", "short", "nothing_seen")}
    | {
        "any_delay": (1, *CASES["any_delay"][1:]),  # "short" has several rows
        "relu": (1, *CASES["relu"][1:]),
        "whole_tiles": (1, 600, 2, 1, 64, "float16", "softmax", 64),
        "one_more": (1, 600, 2, 1, 128, "bfloat16", "softmax", 65),
    }
)
LIMITS = {"bfloat16": 4e-3, "float16": 6e-4}
NAMES = ("out", "final", "d_query", "d_key", "d_value")


def inputs(case, seed=0):
    """Random query, key and value; and the gradients of out and final state."""
    batch, tokens, heads, key_heads, head_dim, dtype, *_ = case
    keys = jax.random.split(jax.random.key(seed), 5)
    counts, scales = (heads, key_heads, key_heads, heads), (2, 2, 1, 1)
    arrays = [
        (jax.random.normal(key, (batch, tokens, n, head_dim)) * scale).astype(dtype)
        for key, n, scale in zip(keys, counts, scales, strict=False)
    ]
    return *arrays, jax.random.normal(keys[4], (batch, key_heads, 2 * head_dim, head_dim))


def both(case, query, key, value, d_out, d_final):
    *sizes, key_lag = case
    shape = LinearAttentionShape(*sizes, key_lag=key_lag)
    out, final, residuals = mosaic_gpu.linear_attention_forward(shape, query, key, value)
    arrays = residuals, query, key, value, d_out, d_final
    return out, final, *mosaic_gpu.linear_attention_backward(shape, *arrays)[:3]


def truth(case, *arrays):
    """Everything in float64, head by head."""
    *_, feature_map, key_lag = case
    query, key, value, d_out, d_final = (np.asarray(x.astype(jnp.float32), np.float64) for x in arrays)
    shared = query.shape[2] // key.shape[2]
    found = [np.zeros(x.shape) for x in (query, d_final, query, key, value)]
    out, final, d_query, d_key, d_value = found
    age = np.subtract.outer(np.arange(query.shape[1]), np.arange(query.shape[1]))
    seen, last = age >= key_lag, (age[-1] >= key_lag)[:, None]

    def halves(x):
        if feature_map == "relu":
            return [np.maximum(x, 0), np.maximum(-x, 0)]
        powers = [np.exp(sign * x - (sign * x).max(axis=1, keepdims=True)) for sign in (1, -1)]
        return [e / e.sum(axis=1, keepdims=True) for e in powers]

    def pulled(phi, d_phi):
        parts = []
        for f, d in zip(phi, np.split(d_phi, 2, axis=1), strict=True):
            parts.append(f * (d - (f * d).sum(axis=1, keepdims=True)) if feature_map == "softmax" else d * (f > 0))
        return parts[0] - parts[1]

    for b, n in np.ndindex(query.shape[0], query.shape[2]):
        k = n // shared
        of_query, of_key, v, do = halves(query[b, :, n]), halves(key[b, :, k]), value[b, :, k], d_out[b, :, n]
        phi_q, phi_k = np.concatenate(of_query, axis=1), np.concatenate(of_key, axis=1)
        scores, d_scores = (phi_q @ phi_k.T) * seen, (do @ v.T) * seen
        out[b, :, n] = scores @ v
        d_query[b, :, n] = pulled(of_query, d_scores @ phi_k)
        d_phi_k = d_scores.T @ phi_q
        d_value[b, :, k] += scores.T @ do
        if n % shared == 0:
            final[b, k] = (phi_k * last).T @ v
            d_value[b, :, k] += (phi_k @ d_final[b, k]) * last
            d_phi_k += (v @ d_final[b, k].T) * last
        d_key[b, :, k] += pulled(of_key, d_phi_k)
    return dict(zip(NAMES, found, strict=True))


def check_values(case, want, values):
    for result, value in zip(NAMES, values, strict=True):
        error, size = np.linalg.norm(np.asarray(value, np.float64) - want[result]), np.linalg.norm(want[result])
        assert error <= LIMITS[case[5]] * size, (result, error, size)  # false for NaN too


# Lowering takes seconds a case; what is left out is the code of others: plain that of any_delay and segments, short
# that of whole_rows, no_delay and nothing_seen that of any_delay for heads as wide as relu's, which is that of segments
# in float16.
LOWERED_SLOWLY = ("plain", "short", "no_delay", "nothing_seen", "any_delay")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LOWERED_SLOWLY)) for name in CASES]
)
def test_kernels_lower_for_cuda(name):
    arrays = jax.eval_shape(lambda: inputs(CASES[name]))
    traced = jax.jit(functools.partial(both, CASES[name])).trace(*arrays)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert all(kernel in text for kernel in KERNELS)
    query, key, value, _, d_final = arrays
    for found, want in zip(traced.out_info, (query, d_final, query, key, value), strict=True):
        assert (found.shape, found.dtype) == (want.shape, want.dtype)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "none of bfloat16, float16; implementation 'triton' takes float32"),
        ({"head_dim": 96}, "head_dim 96 is none of 64, 128; the nearest is 64"),
        ({"head_dim": 256}, "nearest is 128"),
        ({"segmented": True}, "implementation 'triton' does"),
        ({"initial_rows": 1, "initial_heads": 2}, "implementation 'triton' does"),
        ({"continued": True}, "implementation 'xla' does"),
        ({"capability": (8, 9)}, "compute capability 9.x, this one has 8.9"),
    ],
)
def test_unsupported_calls_say_why(changes, reason):
    shape = LinearAttentionShape(2, 8, 4, 2, 64, "float16", "softmax", key_lag=3)
    assert mosaic_gpu_tiling.unsupported_reason(shape) is None
    assert reason in mosaic_gpu_tiling.unsupported_reason(dataclasses.replace(shape, **changes))


def emulate(monkeypatch, *, seed, processors):
    mosaic_emulator.install(monkeypatch, seed)
    for module in (mosaic_gpu_tiling, mosaic_gpu_blocks):
        monkeypatch.setattr(module, "MULTIPROCESSORS", processors)


@pytest.mark.parametrize("name", EMULATED)
def test_emulated_values_are_those_of_float64(name, monkeypatch):
    """Errors are small, and of three cases at most twice those of plain XLA."""
    case = EMULATED[name]
    arrays = inputs(case)
    want = truth(case, *arrays)
    plain = plain_xla(case, *arrays) if name in ("any_delay", "relu", "whole_tiles") else None
    for seed, processors in enumerate((2, 132)):  # several blocks a program, and one
        emulate(monkeypatch, seed=seed, processors=processors)
        values = both(case, *arrays)
        check_values(case, want, values)
        if plain is not None and seed == 0:
            for result, value, other in zip(NAMES, values, plain, strict=True):
                errors = [np.linalg.norm(np.asarray(x, np.float64) - want[result]) for x in (value, other)]
                assert errors[0] <= 2 * errors[1], (result, errors)


def plain_xla(case, query, key, value, d_out, d_final):
    """What the op without kernels gives in the same dtype."""
    attended, pull = jax.vjp(functools.partial(linear_attention_xla.attend, *case[-2:]), query, key, value)
    return *attended, *pull(attended._replace(out=d_out, state=d_final))


def unchecked_wait(ring, step):
    return ring.tiles.at[step % ring.stages]


def hasty_wait(ring, step, wait=launch.Ring.wait, release=launch.Ring.release):
    tile = wait(ring, step)
    release(ring, step)
    return tile


def twofold_release(ring, step, release=launch.Ring.release):
    release(ring, step)
    release(ring, step)


def hasty_load(accumulator, *, wait_n, load=mosaic_emulator.NAMES["plgpu"]["wgmma_accumulator_load"]):
    return load(accumulator, wait_n=wait_n + 1)


def twofold_store(*arguments, store=mosaic_emulator.NAMES["plgpu"]["async_store_smem"], **options):
    store(*arguments, **options)
    store(*arguments, **options)


def nothing(*_, **options):
    pass


RING, TILING, PLGPU = launch.Ring, mosaic_gpu_tiling.Tiling, mosaic_emulator.NAMES["plgpu"]
MISTAKES = {  # what replaces what, and the fault
    "stores that are not committed": ([(PLGPU, "commit_smem", nothing)], "not committed"),
    "stages that are not released": ([(RING, "release", nothing)], "deadlock"),
    "stages that are released twice": ([(RING, "release", twofold_release)], "deadlock|race|were over"),
    "stages that are released at once": ([(RING, "wait", hasty_wait), (RING, "release", nothing)], "race"),
    "copies that are not waited for": ([(RING, "wait", unchecked_wait)], "race"),
    "stores that are not waited for": ([(PLGPU, "wait_smem_to_gmem", nothing)], "race|nothing waited for"),
    "products that are not waited for": ([(PLGPU, "wgmma_accumulator_load", hasty_load)], "is under way"),
    "parts that are sent twice": ([(PLGPU, "async_store_smem", twofold_store)], "race"),
    "copies that start between tiles": ([(TILING, "offset", 70)], "no multiples of 8"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_emulator_finds(mistake, monkeypatch):
    changes, message = MISTAKES[mistake]
    emulate(monkeypatch, seed=0, processors=2)
    for place, name, instead in changes:
        (monkeypatch.setitem if isinstance(place, dict) else monkeypatch.setattr)(place, name, instead)
    with pytest.raises(Fault, match=message) as caught:
        both(SMALL, *inputs(SMALL))
    assert re.search(r"mosaic_gpu\w*\.py:\d+ \(", str(caught.value))


def test_emulated_values_show_a_mask_that_is_a_token_off(monkeypatch):
    emulate(monkeypatch, seed=0, processors=2)
    monkeypatch.setattr(TILING, "strict", False)
    arrays = inputs(SMALL)
    with pytest.raises(AssertionError, match="'out'"):
        check_values(SMALL, truth(SMALL, *arrays), both(SMALL, *arrays))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_values_are_those_of_float64(hopper, name):
    case = CASES[name]
    arrays = inputs(case)
    want = truth(case, *arrays)
    check_values(case, want, jax.jit(functools.partial(both, case))(*arrays))
