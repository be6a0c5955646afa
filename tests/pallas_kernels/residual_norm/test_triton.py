"""The residual norm's Triton kernels: interpreted, compiled ahead of time, traced through jax-triton."""

import functools

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.residual_norm import triton, triton_tiling
from pallas_kernels.residual_norm.shape import ResidualNormShape
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.residual_norm import triton_twin

LIMITS = {"float32": 1e-6, "bfloat16": 4e-3, "float16": 4e-4}  # the interpreter cuts bfloat16 off, it does not round


@pytest.fixture(scope="module")
def interpreted():
    """Errors of all cases, from a process in which triton interprets kernels."""
    return triton_interpreter.errors_of("tests.pallas_kernels.residual_norm.triton_twin", list(triton_twin.CASES))


@pytest.mark.parametrize("name", triton_twin.CASES)
def test_values_and_gradients_are_those_of_float64(interpreted, name):
    limit, found = LIMITS[triton_twin.CASES[name].shape.dtype], interpreted[name]
    assert set(found) == {"around", "normed", "d_x", "d_scale"}
    assert all(error < limit for error in found.values()), found  # false for NaN too


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize(
    "width", [pytest.param(384, marks=pytest.mark.slow), 2048, pytest.param(8192, marks=pytest.mark.slow)]
)
def test_the_kernels_compile_for_gpus(width, capability):
    """Tiles stay in registers: four programs of 128 threads or more share a multiprocessor's."""
    shape = ResidualNormShape(32_768, width, "bfloat16", 1e-6)
    backward = triton.backward_launch(shape, triton_tiling.tiles_of(shape))
    for launch, read in ((triton.forward_launch(shape), 2), (backward, 3)):
        found = triton_compile.compile_launch(launch, ("bfloat16",) * read + ("float32",), capability)
        assert launch.name in found.text
        assert "ld.global.v4" in found.text and "st.global.v4" in found.text
        assert found.registers <= 128 and found.spilled_bytes == 0


@pytest.mark.parametrize(
    ("tokens", "width", "rows", "tiles", "warps"),
    [
        (262_144, 2048, 1, 64, 4),
        (32_768, 2048, 1, 64, 4),
        (1, 2048, 1, 1, 4),
        (32_768, 384, 4, 16, 4),
        (64, 8192, 1, 1, 16),
    ],
)
def test_programs_take_few_tiles_where_there_are_few(tokens, width, rows, tiles, warps):
    shape = ResidualNormShape(tokens, width, "bfloat16", 1e-6)
    found = triton_tiling.rows_of(shape), triton_tiling.tiles_of(shape), triton_tiling.warps_of(shape)
    assert found == (rows, tiles, warps)


def test_unsupported_calls_say_why():
    sizes = {"tokens": 2, "width": 8, "dtype": "float32", "epsilon": 1e-6}
    require_jax_triton()
    assert triton_tiling.unsupported_reason(ResidualNormShape(**sizes)) is None
    for change, reason in (
        ({"dtype": "float64"}, "float64 is none of"),
        ({"width": 8193}, "8193 is above 8192; implementation 'xla' takes it"),
    ):
        assert reason in triton_tiling.unsupported_reason(ResidualNormShape(**sizes | change))
    for change in ({"width": 0}, {"epsilon": 0.0}):
        with pytest.raises(ValueError, match="every size must be 1 or more and epsilon above 0"):
            ResidualNormShape(**sizes | change)


def test_calls_are_traced_under_the_kernels_names():
    require_jax_triton()
    x, scale = jnp.zeros((100, 32), jnp.bfloat16), jnp.zeros(32)
    shape = ResidualNormShape(100, 32, "bfloat16", 1e-6)

    def gradients(x, scale):
        return triton.backward(shape, x, x, x, scale)

    forward = functools.partial(triton.forward, shape)
    assert "residual_norm_forward" in str(jax.make_jaxpr(forward)(x, x, scale))
    assert [(a.shape, a.dtype) for a in jax.eval_shape(forward, x, x, scale)] == [((100, 32), x.dtype)] * 2
    assert "residual_norm_backward" in str(jax.make_jaxpr(gradients)(x, scale))
    d_x, d_scale = jax.eval_shape(gradients, x, scale)
    assert [(a.shape, a.dtype) for a in (d_x, d_scale)] == [((100, 32), x.dtype), ((32,), jnp.float32)]
