"""The Triton kernels of the RAT op: interpreted, compiled ahead of time, traced through jax-triton, and on a GPU."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.rat import (
    select,
    triton,
    triton_attention,
    triton_attention_backward,
    triton_chunk_runs,
    triton_decode,
    triton_recurrence,
    triton_recurrence_backward,
    triton_tiling,
)
from pallas_kernels.rat.state import State
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.rat import triton_twin

# "float16" has grouped heads too, "odd_sizes" several chunks and a rest, "long_chunk_documents" chunks of several
# tiles, "one_token" a row of one chunk, "extend_documents" what is read in parts, "decode_documents" grouped heads.
SLOW = ("plain", "float16", "long_chunk", "one_chunk", "documents", "decode", "extend", "extend_odd_head")
LIMITS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}


@pytest.fixture(scope="module")
def interpreted() -> Callable[[str], dict[str, float]]:
    """Errors of a case, from a process in which triton interprets kernels: one for quick cases, one for the slow."""

    @functools.cache
    def errors(are_slow: bool) -> dict[str, dict[str, float]]:
        names = [
            name
            for name in [*triton_twin.CASES, *triton_twin.DECODE_CASES, *triton_twin.EXTEND_CASES]
            if (name in SLOW) == are_slow
        ]
        return triton_interpreter.errors_of("tests.pallas_kernels.rat.triton_twin", names)

    return lambda name: errors(name in SLOW)[name]


def marked(names) -> list:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in names]


@pytest.mark.parametrize("name", marked(triton_twin.CASES))
def test_values_and_gradients_are_those_of_float64(interpreted, name):
    found = interpreted(name)
    assert set(found) == {"out", "d_bias", "d_z", "d_v", "d_g", "d_q", "d_k"}
    limit = LIMITS[triton_twin.CASES[name].shape.dtype]
    assert all(error < limit for error in found.values()), found  # false for NaN too


@pytest.mark.parametrize("name", marked(triton_twin.DECODE_CASES))
def test_decoding_is_the_forward_pass(interpreted, name):
    assert interpreted(name)["out"] < LIMITS["float32"]


@pytest.mark.parametrize("name", marked(triton_twin.EXTEND_CASES))
def test_reading_in_parts_is_the_forward_pass(interpreted, name):
    assert interpreted(name)["out"] < LIMITS["float32"]


def test_runs_are_chunks_and_the_padding_up_to_the_next_border():
    for seed, L in enumerate((1, 3, 4, 16)):
        generator = np.random.default_rng(seed)
        tokens = 50
        wanted, chunk_starts = np.zeros((2, tokens), np.int32), np.full((2, tokens), -1, np.int32)
        for row in range(2):
            starts, place = [], 0
            while place < tokens:
                is_padding, length = generator.random() < 0.3, int(generator.integers(1, 30))
                for t in range(place, min(place + length, tokens)):
                    if not is_padding:
                        chunk_starts[row, t] = t - (t - place) % L
                    if t == place or (t % L == 0 if is_padding else (t - place) % L == 0):
                        starts.append(t)
                place = min(place + length, tokens)
            # Padding after padding is one stretch of it.
            starts = [t for t in starts if chunk_starts[row, t] >= 0 or t % L == 0 or chunk_starts[row, t - 1] >= 0]
            for t in range(tokens):
                wanted[row, t] = min([start for start in starts if start > t], default=tokens) - t
        np.testing.assert_array_equal(triton_chunk_runs.chunk_runs(jnp.asarray(chunk_starts), L), wanted)


LAUNCHES = {
    triton_recurrence.forward_launch: "d f f f i i i f f i",
    triton_attention.forward_launch: "d d f d d d i i i i i",
    triton_attention_backward.output_launch: "d d d",
    triton_attention_backward.queries_launch: "d f f d d d i i i i i f",
    triton_attention_backward.summaries_launch: "d f f d d d i i i i",
    triton_recurrence_backward.backward_launch: "d f f f i i f f d f f f d",
}


FORWARD = [triton_recurrence.forward_launch, triton_attention.forward_launch]


# Every kernel for one of the cards, and for both where there is time.
@pytest.mark.parametrize(
    ("capability", "segmented", "is_forward"),
    [
        (80, True, False),
        (90, False, True),
        pytest.param(80, True, True, marks=pytest.mark.slow),
        pytest.param(90, False, False, marks=pytest.mark.slow),
    ],
)
def test_kernels_compile_for_gpus(capability, segmented, is_forward):
    small = triton_twin.shape_of(1, 64, 4, 2, 32, 2, "bfloat16", segmented=segmented)
    for make, inputs in LAUNCHES.items():
        if (make in FORWARD) != is_forward:
            continue
        dtypes = tuple({"d": "bfloat16", "f": "float32", "i": "int32"}[letter] for letter in inputs.split())
        found = triton_compile.compile_launch(make(small), dtypes, capability)
        assert make(small).name in found.text
        assert found.shared_bytes <= 99 * 1024


def test_decode_kernels_compile_for_gpus():
    small = triton_twin.shape_of(1, 1, 4, 2, 32, 2, "bfloat16")
    bf16, f32, i32 = "bfloat16", "float32", "int32"
    step = (bf16, f32, f32, f32, i32, i32, i32, f32, f32, f32, f32, f32, bf16, bf16)
    assert "rat_decode_step" in triton_compile.compile_launch(triton_decode.step_launch(small, 8, 2), step, 90).text
    attend = (bf16, f32, f32, i32, i32, bf16, bf16)
    assert (
        "rat_decode_attend" in triton_compile.compile_launch(triton_decode.attend_launch(small, 8, 2), attend, 90).text
    )


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(triton_attention.forward_launch, marks=pytest.mark.slow),
        triton_attention_backward.queries_launch,
        pytest.param(triton_attention_backward.summaries_launch, marks=pytest.mark.slow),
    ],
)
def test_long_rows_fit_cards_with_little_shared_memory(make):
    long = triton_twin.shape_of(1, 65536, 16, 2, 128, 16, "bfloat16")
    dtypes = tuple({"d": "bfloat16", "f": "float32", "i": "int32"}[letter] for letter in LAUNCHES[make].split())
    ada = dataclasses.replace(long, capability=(8, 9))
    assert triton_compile.compile_launch(make(ada), dtypes, 89).shared_bytes <= 99 * 1024


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"dtype": "float64"}, "float64"), ({"head_dim": 512}, "above 256"), ({"batch": 70000}, "65535")],
)
def test_unsupported_calls_say_why(change, reason):
    sizes = {"batch": 2, "tokens": 8, "heads": 4, "groups": 2, "head_dim": 16, "chunk": 4}
    assert triton_tiling.unsupported_reason(triton_twin.shape_of(**sizes)) is None
    assert reason in triton_tiling.unsupported_reason(triton_twin.shape_of(**(sizes | change)))


def test_what_is_not_installed_is_named(monkeypatch):
    found = {"triton": object(), "jax_triton": None}
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found[name])
    sizes = triton_twin.shape_of(2, 64, 4, 2, 64, 4, "bfloat16")
    assert "it needs jax_triton, not installed here" in triton_tiling.unsupported_reason(sizes)
    for implementation in ("mosaic_gpu", "cudnn"):
        reason = select.unsupported_reason(implementation, sizes)
        assert "its recurrence is Triton's, which cannot run this call: it needs jax_triton" in reason


def test_calls_are_traced_under_the_kernels_names():
    require_jax_triton()
    shape = triton_twin.shape_of(2, 10, 4, 2, 16, 4, "bfloat16")
    projected, bias = jnp.zeros((2, 10, shape.projected_width), jnp.bfloat16), jnp.zeros(64)

    def both(projected, bias, d_out):
        out, residuals = triton.rat_forward(shape, projected, bias)
        return out, triton.rat_backward(shape, residuals, projected, bias, d_out)

    d_out = jnp.zeros((2, 10, 64), jnp.bfloat16)
    text = str(jax.make_jaxpr(both)(projected, bias, d_out))
    for make in LAUNCHES:
        assert make(shape).name in text
    out, (d_projected, d_bias) = jax.eval_shape(both, projected, bias, d_out)
    assert (out.shape, out.dtype) == ((2, 10, 64), jnp.bfloat16)
    assert (d_projected.shape, d_projected.dtype) == (projected.shape, jnp.bfloat16)
    assert (d_bias.shape, d_bias.dtype) == ((64,), jnp.float32)


def test_a_decode_step_is_traced_with_its_state():
    require_jax_triton()
    shape = triton_twin.shape_of(2, 1, 4, 2, 16, 4, "bfloat16")
    running, summaries = jnp.zeros((2, 4, 16)), jnp.zeros((2, 300, 4, 16), jnp.bfloat16)
    state = State(running, running, summaries, summaries)
    arrays = (jnp.zeros((2, 1, shape.projected_width), jnp.bfloat16), jnp.zeros(64), state)
    arrays += (jnp.ones((2, 1), jnp.int32), jnp.zeros((2, 1), jnp.int32), jnp.zeros((2, 1), jnp.int32))
    out, after = jax.eval_shape(lambda *arrays: triton_decode.rat_decode(shape, *arrays), *arrays)
    assert out.shape == (2, 1, 64)
    assert [(x.shape, x.dtype) for x in after] == [(x.shape, x.dtype) for x in state]


@pytest.mark.gpu
@pytest.mark.parametrize("name", triton_twin.CASES)
def test_on_the_gpu(name):
    found = triton_twin.errors(triton_twin.CASES[name], device="cuda")
    limit = LIMITS[triton_twin.CASES[name].shape.dtype]
    assert all(error < limit for error in found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("segmented", [False, True])
def test_bfloat16_on_the_gpu(head_dim, segmented):
    lengths = ((130, -7, 63), (200,)) if segmented else ()
    case = triton_twin.Case(triton_twin.shape_of(2, 200, 4, 2, head_dim, 16, "bfloat16", segmented=segmented), lengths)
    found = triton_twin.errors(case, device="cuda")
    assert all(error < LIMITS["bfloat16"] for error in found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("name", triton_twin.DECODE_CASES)
def test_decoding_on_the_gpu(name):
    assert triton_twin.decode_error(*triton_twin.DECODE_CASES[name], device="cuda") < LIMITS["float32"]
