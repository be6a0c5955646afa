"""The gated delta rule's Triton kernels: interpreted, compiled ahead of time, traced through jax-triton, on a GPU."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.gated_delta_rule import triton, triton_tiling
from pallas_kernels.gated_delta_rule.shape import GatedDeltaRuleShape
from pallas_kernels.gated_delta_rule.triton_backward import d_states_launch, gradients_launch
from pallas_kernels.gated_delta_rule.triton_chunks import chunks_launch
from pallas_kernels.gated_delta_rule.triton_outputs import outputs_launch
from pallas_kernels.gated_delta_rule.triton_states import states_launch
from pallas_kernels.gated_delta_rule.triton_tiling import Tiling
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.gated_delta_rule import triton_twin
from tests.pallas_kernels.gated_delta_rule.triton_twin import CASES, NAMES, Case

SLOW = ("chunks", "odd_sizes", "large_chunks", "one_token", "blocks", "forgetful")  # the code of these is in the others
LIMITS = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
LAUNCHES = {  # the dtypes of inputs: d is the call's
    chunks_launch: "d d f f i",
    states_launch: "d d f d f f f",
    outputs_launch: "d d d d f",
    d_states_launch: "d d f d d d f f f",
    gradients_launch: "d d d f f i d d f f d d d d",
}


@pytest.fixture(scope="module")
def interpreted() -> Callable[[str], dict[str, float]]:
    """Errors of a case, from a process in which triton interprets kernels: one for quick cases, one for the slow."""

    @functools.cache
    def errors(are_slow: bool) -> dict[str, dict[str, float]]:
        names = [name for name in CASES if (name in SLOW) == are_slow]
        return triton_interpreter.errors_of("tests.pallas_kernels.gated_delta_rule.triton_twin", names)

    return lambda name: errors(name in SLOW)[name]


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES])
def test_values_and_gradients_are_those_of_float64(interpreted, name):
    found, limit = interpreted(name), LIMITS[CASES[name].tiling.shape.dtype]
    assert set(found) == {"out", "final_state", *(f"d_{name}" for name in NAMES)}
    assert all(error < limit for error in found.values()), found  # false for NaN too


def test_float16_errs_at_most_twice_as_much_as_plain_xla(interpreted):
    found, plain = interpreted("float16"), triton_twin.errors_of_xla(CASES["float16"])
    assert all(found[name] <= 2 * plain[name] for name in plain), (found, plain)


def sizes(key_dim=128, value_dim=128, **changes) -> GatedDeltaRuleShape:
    """Of a layer of 2,048 channels."""
    shape = GatedDeltaRuleShape(64, 4096, 16, key_dim, value_dim, 64, "bfloat16", segmented=True, continued=True)
    return dataclasses.replace(shape, **changes)


@pytest.mark.parametrize(
    "shape",
    [
        sizes(),
        pytest.param(sizes(256, 512, num_heads=6), marks=pytest.mark.slow),
        pytest.param(sizes(48, 96), marks=pytest.mark.slow),
    ],
    ids=lambda x: f"{x.key_dim}_{x.value_dim}",
)
@pytest.mark.parametrize("make", LAUNCHES)
def test_kernels_compile_for_hopper(make, shape):
    launch = make(Tiling(shape))
    dtypes = tuple({"d": shape.dtype, "f": "float32", "i": "int32"}[letter] for letter in LAUNCHES[make].split())
    found = triton_compile.compile_launch(launch, dtypes, 90)
    assert launch.name in found.text
    assert found.spilled_bytes <= 320  # of wide blocks of gradients, which are faster than narrow ones that spill less
    assert found.shared_bytes <= 227 * 1024
    assert "wgmma.mma_async" in found.text


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "nearest: bfloat16"),
        ({"chunk_size": 24}, "none of 16, 32, 64"),
        ({"key_dim": 264}, "nearest: 256"),
        ({"batch": 70_000}, "65535"),
        ({"capability": (8, 0)}, "compute capability 9.x"),
    ],
)
def test_unsupported_calls_say_why(changes, reason):
    assert triton_tiling.unsupported_reason(sizes()) is None
    assert reason in triton_tiling.unsupported_reason(sizes(**changes))
    with pytest.raises(ValueError, match="every size must be 1 or more"):
        sizes(value_dim=0)


@pytest.mark.parametrize("packed", [False, True])
def test_kernels_are_traced_under_their_names(packed):
    require_jax_triton()
    shape = GatedDeltaRuleShape(2, 70, 3, 20, 40, 64, "bfloat16", segmented=packed, continued=packed)
    key, value = jnp.zeros((2, 70, 3, 20), jnp.bfloat16), jnp.zeros((2, 70, 3, 40), jnp.bfloat16)
    gate, state, starts = jnp.zeros((2, 70, 3)), jnp.zeros((2, 3, 20, 40)), jnp.zeros((2, 70), jnp.int32)

    def both(*arrays):
        arguments = *arrays, *((starts, state) if packed else (None, None))
        results = triton.gated_delta_rule_forward(shape, *arguments)
        return *results, *triton.gated_delta_rule_backward(shape, *arguments, *results)

    arrays = key, key, value, gate, gate
    text = str(jax.make_jaxpr(both)(*arrays))
    for make in LAUNCHES:
        assert make(Tiling(shape)).name in text
    found = jax.eval_shape(both, *arrays)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in (value, state, *arrays, state)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name):
    case = CASES[name]
    tiling = dataclasses.replace(case.tiling, shape=dataclasses.replace(case.tiling.shape, dtype="bfloat16"))
    tiling = dataclasses.replace(tiling, solve_precision=Tiling(tiling.shape).solve_precision)
    case = dataclasses.replace(case, tiling=tiling)
    found, plain = triton_twin.errors(case, device="cuda"), triton_twin.errors_of_xla(case)
    # Where every token writes to one key, plain XLA's gradients of write strengths are off by 5 % too.
    assert all(found[name] < max(LIMITS["bfloat16"], 2 * plain[name]) for name in found), (found, plain)


@pytest.mark.gpu
@pytest.mark.parametrize(("key_dim", "value_dim"), [(48, 96), (128, 128), (256, 512)])
@pytest.mark.parametrize("segmented", [False, True])
def test_bfloat16_on_the_gpu(key_dim, value_dim, segmented):
    shape = sizes(key_dim, value_dim, batch=2, tokens=700, num_heads=2, segmented=segmented)
    found = triton_twin.errors(Case(Tiling(shape), ((300, 320), (0,)) if segmented else ()), device="cuda")
    assert all(error < LIMITS["bfloat16"] for error in found.values()), found
