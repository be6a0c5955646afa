"""Linear attention's step of one token: interpreted, compiled ahead of time, traced through jax-triton, on a GPU."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.linear_attention import triton_step
from tests.equations import equations
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.linear_attention import step_twin
from tests.pallas_kernels.linear_attention.step_twin import CASES, shape_of

LIMITS = {"float32": 1e-6, "float16": 4e-4, "bfloat16": 4e-3}  # of the output


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, float]]:
    """Errors of all cases, from a process in which triton interprets kernels."""
    return triton_interpreter.errors_of("tests.pallas_kernels.linear_attention.step_twin", list(CASES))


def check(found: dict[str, float], dtype: str) -> None:
    assert found["out"] < LIMITS[dtype]  # false for NaN too
    assert found["state"] < LIMITS["float32"]
    assert found["by_padding"] == 0


@pytest.mark.parametrize("name", CASES)
def test_output_and_state_are_those_of_float64(interpreted, name):
    check(interpreted[name], CASES[name].dtype)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("initial", [{}, {"initial_rows": 1, "initial_heads": 16}], ids=["plain", "initial"])
def test_the_kernel_compiles_for_gpus(head_dim, initial, capability):
    """A state is read and written 16 bytes at a time, and held in registers."""
    launch = triton_step.step_launch(shape_of(16, 4, head_dim, "bfloat16", rows=64, **initial))
    inputs = ("bfloat16", "bfloat16", "bfloat16", "int32", "float32" if initial else "bfloat16", "float32")
    found = triton_compile.compile_launch(launch, inputs, capability)
    assert launch.name in found.text
    assert "ld.global.v4" in found.text and "st.global.v4" in found.text
    assert found.spilled_bytes == 0


@pytest.mark.parametrize("initial", [None, (1, 2), (3, 4), (3, 2)], ids=str)
def test_a_step_is_traced_with_its_state_as_one_operand_that_is_overwritten(initial):
    """A second use would make XLA copy the state, and so would a conversion before the call."""
    require_jax_triton()
    initial_rows, initial_heads = initial or (0, 0)
    shape = shape_of(4, 2, 20, "bfloat16", initial_rows=initial_rows, initial_heads=initial_heads)
    query, key = jnp.zeros((3, 1, 4, 20), jnp.bfloat16), jnp.zeros((3, 1, 2, 20), jnp.bfloat16)
    state = jnp.zeros((3, 2, 40, 20))
    initial_state = None if initial is None else jnp.zeros((*initial, 40, 20), jnp.bfloat16)

    def step(state, *arrays):
        return triton_step.step(shape, *arrays, state)

    traced = jax.make_jaxpr(step)(state, query, key, key, jnp.ones(3, bool), initial_state)
    (call,) = (
        x for x in equations(traced.jaxpr) if x.params.get("name") == "linear_attention_step" and "jaxpr" in x.params
    )
    (kernel,) = (x for x in equations(call.params["jaxpr"].jaxpr) if "input_output_aliases" in x.params)
    assert [x is traced.jaxpr.invars[0] for x in call.invars] == [False] * 5 + [True]
    assert [x is call.params["jaxpr"].jaxpr.invars[5] for x in kernel.invars] == [False] * 5 + [True]
    assert dict(kernel.params["input_output_aliases"]) == {5: 1}
    assert call.outvars[1] is traced.jaxpr.outvars[1]
    assert [(x.shape, x.dtype) for x in traced.out_avals] == [((3, 1, 4, 20), jnp.bfloat16), (state.shape, jnp.float32)]


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_on_the_gpu(name):
    check(step_twin.errors(CASES[name], device="cuda"), CASES[name].dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("feature_map", ["softmax", "relu"])
def test_bfloat16_on_the_gpu(head_dim, feature_map):
    shape = shape_of(16, 4, head_dim, "bfloat16", feature_map, rows=66, initial_rows=1, initial_heads=16)
    check(step_twin.errors(shape, device="cuda"), "bfloat16")
