"""The normed sum's Triton kernels: interpreted, compiled ahead of time, traced through jax-triton."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.normed_sum import triton, triton_tiling
from pallas_kernels.normed_sum.shape import NormedSumShape
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.normed_sum import triton_twin

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 4e-4}  # the interpreter cuts bfloat16 off, it does not round


@pytest.fixture(scope="module")
def interpreted():
    """Errors of all cases, from a process in which triton interprets kernels."""
    return triton_interpreter.errors_of("tests.pallas_kernels.normed_sum.triton_twin", list(triton_twin.CASES))


@pytest.mark.parametrize("name", triton_twin.CASES)
def test_values_and_gradients_are_those_of_float64(interpreted, name):
    limit, found = LIMITS[triton_twin.CASES[name].shape.dtype], interpreted[name]
    assert set(found) == {"out", "d_first", "d_second", "d_first_scale", "d_second_scale"}
    assert all(error < limit for error in found.values()), found  # false for NaN too


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("head_dim", [pytest.param(64, marks=pytest.mark.slow), 128])
def test_kernels_compile_for_gpus(head_dim, capability):
    """Tiles stay in registers: four programs of 128 threads or more share a multiprocessor's."""
    shape = NormedSumShape(262_144, 16, head_dim, "bfloat16", 1e-8)
    arrays = "bfloat16", "bfloat16", "float32", "float32"
    for launch, dtypes in (
        (triton.forward_launch(shape), arrays),
        (triton.backward_launch(shape, triton_tiling.tiles_of(shape)), (*arrays, "bfloat16")),
    ):
        found = triton_compile.compile_launch(launch, dtypes, capability)
        assert launch.name in found.text and "ld.global.v4" in found.text
        assert found.registers <= 128 and found.spilled_bytes == 0


@pytest.mark.parametrize(
    ("tokens", "heads", "head_dim", "tiles"),
    [(262_144, 16, 128, 64), (32_768, 16, 128, 16), (1, 16, 128, 1), (8192, 4, 64, 1)],
)
def test_programs_take_few_tiles_where_there_are_few(tokens, heads, head_dim, tiles):
    assert triton_tiling.tiles_of(NormedSumShape(tokens, heads, head_dim, "bfloat16", 1e-8)) == tiles


def test_unsupported_calls_say_why():
    sizes = {"tokens": 2, "heads": 1, "head_dim": 8, "dtype": "float32", "epsilon": 1e-8}
    assert triton_tiling.unsupported_reason(NormedSumShape(**sizes)) is None
    for change, reason in (({"dtype": "float64"}, "float64 is none of"), ({"head_dim": 257}, "257 is above 256")):
        assert reason in triton_tiling.unsupported_reason(NormedSumShape(**sizes | change))
    for change in ({"heads": 0}, {"epsilon": 0.0}):
        with pytest.raises(ValueError, match="every size must be 1 or more and epsilon above 0"):
            NormedSumShape(**sizes | change)


def test_calls_are_traced_under_the_kernels_names():
    require_jax_triton()
    shape = NormedSumShape(100, 2, 16, "bfloat16", 1e-8)
    x, scale = jnp.zeros((100, 32), jnp.bfloat16), jnp.zeros(32)

    def both(x, scale):
        return triton.forward(shape, x, x, scale, scale), triton.backward(shape, x, x, scale, scale, x)

    text = str(jax.make_jaxpr(both)(x, scale))
    assert all(name in text for name in ("normed_sum_forward", "normed_sum_backward"))
    out, gradients = jax.eval_shape(both, x, scale)
    assert [(a.shape, a.dtype) for a in (out, *gradients)] == [((100, 32), x.dtype)] * 3 + [((32,), jnp.float32)] * 2
