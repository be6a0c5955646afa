"""The gated delta rule's step of a token: interpreted, compiled ahead of time, traced through jax-triton, on a GPU."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.gated_delta_rule import triton_step, triton_tiling
from tests.equations import equations
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.gated_delta_rule import step_twin
from tests.pallas_kernels.gated_delta_rule.step_twin import CASES, shape_of

LIMITS = {"float32": 1e-6, "float16": 4e-4, "bfloat16": 4e-3}  # of the output


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of all cases, from a process in which triton interprets kernels."""
    return triton_interpreter.errors_of("tests.pallas_kernels.gated_delta_rule.step_twin", list(CASES))


def check(found: dict[str, float], dtype: str) -> None:
    assert found["out"] < LIMITS[dtype]  # false for NaN too
    assert found["state"] < LIMITS["float32"]
    assert found["by_padding"] == 0


@pytest.mark.parametrize("name", CASES)
def test_output_and_state_are_those_of_float64(interpreted, name):
    check(interpreted[name], CASES[name].dtype)


SIZES = [(6, 256, 512), (16, 128, 128), (4, 64, 64)]


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_kernel_compiles_for_gpus(sizes, capability):
    """A state is read and written 16 bytes at a time, and held in registers."""
    launch = triton_step.step_launch(shape_of(*sizes, "bfloat16", rows=64))
    inputs = (*["bfloat16"] * 3, "float32", "float32", "int32", "float32")
    found = triton_compile.compile_launch(launch, inputs, capability)
    assert launch.name in found.text
    assert "ld.global.v4" in found.text and "st.global.v4" in found.text
    assert found.spilled_bytes == 0


@pytest.mark.parametrize(
    ("changes", "of_chunks"),
    [
        ({"dtype": "float32"}, "dtype float32 is none of bfloat16, float16; nearest: bfloat16"),
        ({"chunk_size": 24}, "chunk_size 24 is none of 16, 32, 64"),
        ({"capability": (8, 0)}, "it needs a card of compute capability 9.x, this one has 8.0"),
    ],
    ids=str,
)
def test_a_step_needs_nothing_that_chunks_alone_need(changes, of_chunks):
    step = dataclasses.replace(shape_of(3, 40, 70, "bfloat16"), **changes)
    assert triton_tiling.unsupported_reason(step) is None
    for several in ({"tokens": 2}, {"continued": False}):
        assert triton_tiling.unsupported_reason(dataclasses.replace(step, **several)) == of_chunks


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key_dim": 264}, "it takes keys of at most 256 channels, got 264; nearest: 256"),
        ({"batch": 70_000}, "batch 70000 is above 65535, the longest grid axis; split the batch"),
    ],
    ids=str,
)
def test_a_step_needs_what_every_kernel_needs(changes, reason, tokens, monkeypatch):
    shape = shape_of(3, 40, 70, "bfloat16", tokens=tokens)
    assert triton_tiling.unsupported_reason(shape) is None
    assert triton_tiling.unsupported_reason(dataclasses.replace(shape, **changes)) == reason
    monkeypatch.setattr(triton_tiling, "missing_dependency", lambda: "it wants what is not installed")
    assert triton_tiling.unsupported_reason(shape) == "it wants what is not installed"


def test_a_step_takes_no_float64():
    reason = "dtype float64 is none of bfloat16, float16, float32; nearest: float32"
    assert triton_tiling.unsupported_reason(shape_of(3, 40, 70, "float64")) == reason


def test_a_step_is_traced_with_its_state_as_one_operand_that_is_overwritten():
    """A second use would make XLA copy the state, and so would a conversion before the call."""
    require_jax_triton()
    shape = shape_of(3, 20, 40, "bfloat16", rows=2)
    key, value = jnp.zeros((2, 1, 3, 20), jnp.bfloat16), jnp.zeros((2, 1, 3, 40), jnp.bfloat16)
    gate, state = jnp.zeros((2, 1, 3)), jnp.zeros((2, 3, 20, 40))

    def step(state, *arrays):
        return triton_step.step(shape, *arrays, state)

    traced = jax.make_jaxpr(step)(state, key, key, value, gate, gate, jnp.ones(2, bool))
    (call,) = (
        x for x in equations(traced.jaxpr) if x.params.get("name") == "gated_delta_rule_step" and "jaxpr" in x.params
    )
    (kernel,) = (x for x in equations(call.params["jaxpr"].jaxpr) if "input_output_aliases" in x.params)
    assert [x is traced.jaxpr.invars[0] for x in call.invars] == [False] * 6 + [True]
    assert [x is call.params["jaxpr"].jaxpr.invars[6] for x in kernel.invars] == [False] * 6 + [True]
    assert dict(kernel.params["input_output_aliases"]) == {6: 1}
    assert call.outvars[1] is traced.jaxpr.outvars[1]
    assert [(x.shape, x.dtype) for x in traced.out_avals] == [(value.shape, jnp.bfloat16), (state.shape, jnp.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name):
    check(step_twin.errors(CASES[name], device="cuda"), CASES[name].dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", [*SIZES, (5, 48, 96)], ids=str)
def test_bfloat16_on_the_gpu(sizes):
    check(step_twin.errors(shape_of(*sizes, "bfloat16", rows=66), device="cuda"), "bfloat16")
