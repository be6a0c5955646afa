"""Linear attention's Triton kernels: interpreted, compiled ahead of time, traced through jax-triton, and on a GPU."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.linear_attention import triton, triton_backward, triton_tiling
from pallas_kernels.linear_attention.shape import LinearAttentionShape
from pallas_kernels.linear_attention.triton_outputs import outputs_launch
from pallas_kernels.linear_attention.triton_states import scan_launch, states_launch, totals_launch
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.linear_attention import triton_twin
from tests.pallas_kernels.linear_attention.triton_twin import CASES, LinearCase, tiling_of

# Documents, float16 (grouped heads too) and odd heads have the kernels of these, with more to them.
SLOW = ("plain", "relu", "segments", "grouped_heads", "whole_rows")
LIMITS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 1e-2}


@pytest.fixture(scope="module")
def interpreted() -> Callable[[str], dict[str, float]]:
    """Errors of a case, from a process in which triton interprets kernels: one for quick cases, one for the slow."""

    @functools.cache
    def errors(are_slow: bool) -> dict[str, dict[str, float]]:
        names = [name for name in CASES if (name in SLOW) == are_slow]
        return triton_interpreter.errors_of("tests.pallas_kernels.linear_attention.triton_twin", names)

    return lambda name: errors(name in SLOW)[name]


def marked(names) -> list:
    return [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in names]


@pytest.mark.parametrize("name", marked(CASES))
def test_values_and_gradients_are_those_of_float64(interpreted, name):
    found, sizes = interpreted(name), CASES[name].tiling.shape
    wanted = {"out", "final", "d_query", "d_key", "d_value"}
    assert set(found) == wanted | ({"d_initial"} if sizes.initial_heads else set())
    limit = LIMITS[sizes.dtype]
    assert all(error < limit for error in found.values()), found  # false for NaN too


def launches(tiling):
    """Every launch of a call, with the dtypes of its inputs: d is the call's."""
    shape = tiling.shape
    return [
        (totals_launch(tiling, shape.key_heads, False), "d d i"),
        (totals_launch(tiling, shape.num_heads, True), "d d i"),
        (scan_launch(tiling, True), "f f i"),
        (states_launch(tiling, shape.key_heads, False), "d d f i"),
        (states_launch(tiling, shape.num_heads, True), "d d f i"),
        (outputs_launch(tiling), "d d d d d i"),
        (triton_backward.keys_launch(tiling), "d d d d d i"),
        (triton_backward.queries_launch(tiling), "d d d d d d i"),
    ]


def compiled(tiling, capability, part=""):
    """The launches of a call whose names have a certain part, and what they compile to."""
    names = {"d": tiling.shape.dtype, "f": "float32", "i": "int32"}
    for launch, inputs in launches(tiling):
        if part not in launch.name:
            continue
        yield launch, triton_compile.compile_launch(launch, tuple(names[x] for x in inputs.split()), capability)


LONG = {"batch": 1, "tokens": 262144, "heads": 16, "key_heads": 4, "head_dim": 128, "dtype": "bfloat16"}


WITH_ALL = {"segmented": True, "initial_rows": 1, "initial_heads": 16}


@pytest.mark.parametrize(
    ("change", "part", "spilled"),
    [
        (WITH_ALL, "keys", 1200),
        pytest.param(WITH_ALL, "", 1200, marks=pytest.mark.slow),
        pytest.param({}, "", 512, marks=pytest.mark.slow),
    ],
)
def test_long_rows_compile_for_hopper(change, part, spilled):
    found_launches = list(compiled(tiling_of(**LONG, **change), 90, part))
    assert found_launches
    for launch, found in found_launches:
        assert launch.name in found.text
        assert found.spilled_bytes <= spilled, launch.name
        assert found.shared_bytes <= 227 * 1024
        assert "scan" in launch.name or "wgmma.mma_async" in found.text


@pytest.mark.parametrize(
    ("capability", "change"),
    [
        (80, {"head_dim": 24, "feature_map": "relu"}),
        (90, {"head_dim": 12, "dtype": "float32"}),
        # Wider heads take longer to compile.
        pytest.param(80, {"head_dim": 96, "feature_map": "relu"}, marks=pytest.mark.slow),
        pytest.param(90, {"head_dim": 48, "dtype": "float32"}, marks=pytest.mark.slow),
        # Documents and initial states compile for Hopper above, and for these cards where there is time.
        pytest.param(
            80, {"head_dim": 32, "segmented": True, "initial_rows": 1, "initial_heads": 4}, marks=pytest.mark.slow
        ),
    ],
)
def test_kernels_compile_for_gpus(capability, change):
    sizes = {**LONG, "tokens": 64, "heads": 4, "key_heads": 2, "capability": divmod(capability, 10)} | change
    for launch, found in compiled(tiling_of(**sizes), capability):
        assert launch.name in found.text
        assert found.shared_bytes <= (163 if capability == 80 else 227) * 1024


@pytest.mark.parametrize("part", ["keys", pytest.param("", marks=pytest.mark.slow)], ids=["keys", "all"])
def test_long_rows_fit_cards_with_little_shared_memory(part):
    found = list(compiled(tiling_of(**LONG, capability=(8, 9)), 89, part))
    assert found
    for launch, resources in found:
        assert resources.shared_bytes <= 99 * 1024, launch.name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float64"}, "nearest: float32"),
        ({"head_dim": 512}, "nearest: 256"),
        ({"batch": 70000}, "65535"),
        ({"key_lag": 3}, "shift keys and values instead"),
        ({"continued": True}, "it takes a state beside one token a row alone; implementation 'xla' takes more"),
    ],
)
def test_unsupported_calls_say_why(changes, reason):
    shape = LinearAttentionShape(2, 8, 4, 2, 16, "bfloat16", "softmax", True, initial_rows=2, initial_heads=4)
    assert triton_tiling.unsupported_reason(shape) is None
    assert reason in triton_tiling.unsupported_reason(dataclasses.replace(shape, **changes))


def test_one_token_that_continues_a_state_is_taken():
    shape = LinearAttentionShape(2, 1, 4, 2, 16, "bfloat16", "softmax", True, initial_rows=2, initial_heads=4)
    assert triton_tiling.unsupported_reason(dataclasses.replace(shape, continued=True)) is None


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_are_traced_under_their_names(packed):
    require_jax_triton()
    query, key = jnp.zeros((2, 70, 4, 20), jnp.bfloat16), jnp.zeros((2, 70, 2, 20), jnp.bfloat16)
    more = {"initial_state": jnp.zeros((1, 4, 40, 20)), "segment_ids": jnp.zeros((2, 70), jnp.int32)} if packed else {}
    sizes = {"segmented": True, "initial_rows": 1, "initial_heads": 4} if packed else {}
    tiling = tiling_of(2, 70, 4, 2, 20, "bfloat16", **sizes)

    def both(query, key, value):
        out, state, residuals = triton.linear_attention_forward(tiling.shape, query, key, value, **more)
        arrays = residuals, query, key, value, out, state
        return out, state, triton.linear_attention_backward(tiling.shape, *arrays, **more)

    text = str(jax.make_jaxpr(both)(query, key, key))
    for launch, _ in launches(tiling):
        assert launch.name in text
    out, state, (d_query, d_key, d_value, d_initial) = jax.eval_shape(both, query, key, key)
    for found, wanted in ((out, query), (d_query, query), (d_key, key), (d_value, key)):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
    assert (state.shape, state.dtype) == ((2, 2, 40, 20), jnp.float32)
    assert (d_initial is not None) == packed
    if packed:
        assert (d_initial.shape, d_initial.dtype) == ((1, 4, 40, 20), jnp.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name):
    found = triton_twin.errors(CASES[name], device="cuda")
    limit = LIMITS[CASES[name].tiling.shape.dtype]
    assert all(error < limit for error in found.values()), found


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
@pytest.mark.parametrize("segmented", [False, True])
def test_bfloat16_on_the_gpu(head_dim, feature_map, segmented):
    sizes = tiling_of(
        2, 700, 8, 2, head_dim, "bfloat16", feature_map, segmented, initial_rows=2, initial_heads=8, sum_programs=16
    )
    case = LinearCase(sizes, ((300, 20, 380), (700,)) if segmented else ())
    found = triton_twin.errors(case, device="cuda")
    assert all(error < LIMITS["bfloat16"] for error in found.values()), found
