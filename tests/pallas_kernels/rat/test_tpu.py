"""The TPU kernels of the RAT op in interpret mode, against the float64 loop of `rat_loop`."""

import dataclasses
import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.rat import tpu, tpu_tiling
from pallas_kernels.rat.shape import RatShape
from tests.pallas_kernels.rat.loop import Case, loop

SMALL = tpu.Tiles(tokens=16, slots=128)
WIDER = tpu.Tiles(tokens=32, slots=128)
# What a case holds, by name: tokens T, chunk L, heads N, groups G, channels H, base, tiles, packed.
CASES = {
    "one token": (1, 16, 2, 1, 8, 10000.0, None, False),
    "chunk less one": (15, 16, 4, 2, 8, 10000.0, None, False),
    "one chunk": (16, 16, 2, 2, 8, 10000.0, None, False),
    "chunk and one": (17, 16, 2, 1, 8, 10000.0, None, False),
    "several tiles": (100, 16, 4, 2, 8, 100.0, WIDER, False),
    "chunks of one": (300, 1, 2, 2, 8, 10000.0, None, False),
    "odd heads": (100, 12, 3, 1, 7, None, WIDER, False),
    "chunks over tiles": (100, 21, 2, 1, 10, 10000.0, SMALL, False),
    "one long chunk": (40, 50, 2, 1, 8, 10000.0, SMALL, False),
    "wide heads": (24, 8, 2, 2, 256, 10000.0, SMALL, False),
    "long": (700, 16, 2, 1, 64, 10000.0, None, False),
    "packed": (100, 8, 2, 2, 8, 100.0, SMALL, True),
    "packed, chunks over tiles": (100, 21, 2, 1, 8, 100.0, SMALL, True),
    "packed, chunks of one": (150, 1, 2, 1, 8, 100.0, WIDER, True),
}


def make_case(tokens, chunk, heads, groups, head_dim, base, packed, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    width = heads * head_dim
    projected = rng.normal(size=(batch, tokens, 3 * width + 2 * groups * head_dim)).astype(np.float32)
    bias = rng.normal(1.0, 1.0, size=width).astype(np.float32)
    positions, segment_ids = documents(rng, batch, tokens, chunk) if packed else (None, None)
    return Case(projected, bias, groups, chunk, base, positions, segment_ids)


def documents(rng, batch, tokens, chunk):
    """Rows of documents that start anywhere, with padding before, between and after them; ids return."""
    positions, segment_ids = np.zeros((batch, tokens), np.int32), np.zeros((batch, tokens), np.int32)
    for row in range(batch):
        t, segment = int(rng.integers(0, 3)), 1
        while t < tokens:
            end = min(tokens, t + int(rng.integers(1, 3 * chunk + 3)))
            segment_ids[row, t:end], positions[row, t:end] = segment, np.arange(end - t)
            segment, t = 3 - segment, end + int(rng.integers(0, 4)) * int(rng.integers(0, 2))
    return positions, segment_ids


def arguments(case, dtype=jnp.float32):
    arrays = dict(projected=jnp.asarray(case.projected, dtype), gate_bias=jnp.asarray(case.gate_bias))
    if case.segment_ids is not None:
        arrays |= dict(positions=jnp.asarray(case.positions), segment_ids=jnp.asarray(case.segment_ids))
    return arrays


def shape_of(case, dtype=jnp.float32):
    batch, tokens, _, heads, head_dim = case.sizes
    sizes = (batch, tokens, heads, case.num_groups, head_dim, case.chunk_size)
    return RatShape(*sizes, jnp.dtype(dtype).name, case.rope_base, segmented=case.segment_ids is not None)


# Interpreted kernels compile long and run short: leave out what only makes them faster.
@functools.partial(
    jax.jit,
    static_argnames=("shape", "interpret", "tiles"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def forward_and_backward(shape, arrays, d_out, **settings):
    out, residuals = tpu.rat_forward(shape, **arrays, **settings)
    return out, residuals, tpu.rat_backward(shape, residuals, **arrays, d_out=d_out, **settings)


def run(case, d_out, *, tiles, dtype=jnp.float32, interpret=True):
    arrays = arguments(case, dtype), jnp.asarray(d_out, dtype)
    return forward_and_backward(shape_of(case, dtype), *arrays, interpret=interpret, tiles=tiles)


def output_gradient(case, seed=1):
    batch, tokens, width, _, _ = case.sizes
    return np.random.default_rng(seed).normal(size=(batch, tokens, width)).astype(np.float32)


def check(case, results, d_out, tolerance):
    """Compares every result with the loop; errors count against the largest true value of the array, at least 1."""
    out, residuals, (d_projected, d_gate_bias) = results
    truth = loop(case, d_out)
    found = dict(
        out=out,
        log_sum_exp=residuals.log_sum_exp,
        summary_key=residuals.summary_key,
        summary_value=residuals.summary_value,
        d_projected=d_projected,
        d_gate_bias=d_gate_bias,
    )
    for name, array in found.items():
        true = getattr(truth, name)
        assert array.shape == true.shape, name
        error = np.abs(np.asarray(array, np.float64) - true).max()
        assert error <= tolerance * max(1.0, np.abs(true).max()), f"{name}: error {error:.2e}"


# The longest takes the tiles of "chunks of one", many of them as "several tiles" do; a row is shorter than its chunk in
# "one token" and longer in "several tiles"; chunks lie over tiles in "one long chunk" and, packed, in "packed, chunks
# over tiles"; packed chunks of several tokens are in the latter and in tests/ops/test_rat.py, chunks of one in rows
# that are not packed.
SLOW = (
    *("long", "chunk less one", "one chunk", "chunk and one", "chunks over tiles"),
    *("packed", "packed, chunks of one"),
)


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in CASES])
def test_values_and_gradients(name):
    *shape, tiles, packed = CASES[name]
    case = make_case(*shape, packed)
    d_out = output_gradient(case)
    check(case, run(case, d_out, tiles=tiles), d_out, 3e-6)


def test_loop_gradient_is_the_slope_of_the_loop():
    case = make_case(13, 4, 2, 1, 4, 10.0, True)
    case.projected, case.gate_bias = case.projected.astype(np.float64), case.gate_bias.astype(np.float64)
    d_out = output_gradient(case)
    truth = loop(case, d_out)
    rng = np.random.default_rng(2)
    step, bias_step = rng.normal(size=case.projected.shape), rng.normal(size=case.gate_bias.shape)

    def objective(distance):
        moved = Case(
            case.projected + distance * step,
            case.gate_bias + distance * bias_step,
            case.num_groups,
            case.chunk_size,
            case.rope_base,
            case.positions,
            case.segment_ids,
        )
        return np.sum(loop(moved, d_out).out * d_out)

    slope = (objective(1e-5) - objective(-1e-5)) / 2e-5
    np.testing.assert_allclose(slope, np.sum(truth.d_projected * step) + truth.d_gate_bias @ bias_step, rtol=1e-7)


def test_gates_near_zero_and_one():
    case = make_case(40, 8, 2, 1, 8, 10000.0, False)
    width = case.gate_bias.shape[0]
    case.gate_bias[:] = np.where(np.arange(width) % 2, 15.0, -15.0)
    case.projected[:, :, 2 * width : 3 * width] += np.random.default_rng(3).choice([-40.0, 0.0, 40.0])
    case.projected[:, ::3, 2 * width : 3 * width] = 100.0
    case.projected[:, 1::3, 2 * width : 3 * width] = -100.0
    d_out = output_gradient(case)
    check(case, run(case, d_out, tiles=SMALL), d_out, 3e-6)


def test_large_scores_do_not_overflow():
    case = make_case(40, 8, 2, 1, 8, 10000.0, False)
    case.projected[:, :, 48:] *= 30.0
    d_out = output_gradient(case)
    results = run(case, d_out, tiles=SMALL)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(results))
    check(case, results, d_out, 1e-4)


# Whole rows in bfloat16 are in tests/ops/test_rat.py too.
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bfloat16(packed):
    case = make_case(100, 8, 2, 1, 128, 10000.0, packed)
    d_out = output_gradient(case)
    case.projected = np.asarray(jnp.asarray(case.projected, jnp.bfloat16), np.float32)
    d_out = np.asarray(jnp.asarray(d_out, jnp.bfloat16), np.float32)
    results = run(case, d_out, tiles=SMALL, dtype=jnp.bfloat16)
    assert results[0].dtype == results[2][0].dtype == jnp.bfloat16
    assert results[1].log_sum_exp.dtype == results[2][1].dtype == jnp.float32
    check(case, results, d_out, 2 * float(jnp.finfo(jnp.bfloat16).eps))


# Packed rows are read by the same kernels, which then read the places of documents too.
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nothing_is_read_that_was_not_written(packed):
    case = make_case(45, 7, 2, 1, 8, 10000.0, packed, batch=1)  # chunks of 7 are padded to fit tiles
    d_out = output_gradient(case)
    interpret = pltpu.InterpretParams(uninitialized_memory="nan", out_of_bounds_reads="uninitialized")
    check(case, run(case, d_out, tiles=SMALL, interpret=interpret), d_out, 3e-6)


def test_two_shapes_in_turn_and_no_second_compilation(caplog):
    settings = dict(interpret=True, tiles=SMALL)
    short, long = (make_case(tokens, 4, 1, 1, 8, None, False, batch=1) for tokens in (20, 70))
    first = [tpu.rat_forward(shape_of(case), **arguments(case), **settings)[0] for case in (short, long)]
    with caplog.at_level(logging.WARNING), jax.log_compiles():
        again = [tpu.rat_forward(shape_of(case), **arguments(case), **settings)[0] for case in (short, long)]
    assert not [record for record in caplog.records if "XLA compilation of jit(rat_forward)" in record.getMessage()]
    for case, one, two in zip((short, long), first, again, strict=True):
        np.testing.assert_allclose(one, loop(case, np.zeros(one.shape)).out, atol=3e-6)
        np.testing.assert_array_equal(one, two)


def test_earlier_tokens_do_not_see_later_ones():
    case = make_case(40, 8, 2, 1, 8, 10000.0, False)
    d_out = np.zeros((2, 40, 16), np.float32)
    d_out[:, 21] = 1.0
    _, _, (d_projected, _) = run(case, d_out, tiles=SMALL)
    reached = np.abs(np.asarray(d_projected)).max(axis=(0, 2)) > 0
    np.testing.assert_array_equal(reached, np.arange(40) <= 21)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"dtype": "float16"}, "dtype float16 is none of bfloat16, float32"),
        ({"head_dim": 1024}, "nearest: 512"),
        ({"continued": True}, "implementations 'triton' and 'xla' do"),
    ],
)
def test_unsupported_calls_say_why(changes, text):
    shape = RatShape(1, 8, 2, 1, 8, 4, "float32", None, segmented=False)
    assert tpu_tiling.unsupported_reason(shape) is None
    assert text in tpu_tiling.unsupported_reason(dataclasses.replace(shape, **changes))
