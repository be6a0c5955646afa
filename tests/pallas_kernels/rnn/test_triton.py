"""The RNN op's Triton kernels: interpreted, compiled ahead of time, traced through jax-triton."""

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("triton", reason="triton is installed on Linux only")
pytest.importorskip("torch", reason="triton's interpreter works on torch tensors")

from pallas_kernels.rnn import triton, triton_backward, triton_forward, triton_tiling
from pallas_kernels.rnn.shape import RnnShape
from tests.jax_triton import require_jax_triton
from tests.pallas_kernels import triton_compile, triton_interpreter
from tests.pallas_kernels.rnn import triton_twin

LIMITS = {"float32": 2e-6, "bfloat16": 1e-2}
SLOW = ("spans", "near_one", "near_zero", "bfloat16")  # the code of these is in the others
LAUNCHES = {  # the dtypes of inputs: d is the call's
    triton_forward.spans_launch: "d f i",
    triton_forward.forward_launch: "d f i f",
    triton_backward.spans_launch: "d f i d",
    triton_backward.backward_launch: "d f i d f f",
}


@pytest.fixture(scope="module")
def interpreted():
    """Errors of the quick cases, from a process in which triton interprets kernels."""
    names = [name for name in triton_twin.CASES if name not in SLOW]
    return triton_interpreter.errors_of("tests.pallas_kernels.rnn.triton_twin", names)


def check(found, name):
    limit = LIMITS[triton_twin.CASES[name].shape.dtype]
    assert set(found) == {"out", "state", "d_bias", "d_z", "d_v", "d_g"}
    assert all(error < limit for error in found.values()), found  # false for NaN too


@pytest.mark.parametrize("name", [name for name in triton_twin.CASES if name not in SLOW])
def test_values_and_gradients_are_those_of_float64(interpreted, name):
    check(interpreted[name], name)


@pytest.mark.slow
def test_further_values_and_gradients():
    for name, found in triton_interpreter.errors_of("tests.pallas_kernels.rnn.triton_twin", list(SLOW)).items():
        check(found, name)


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
@pytest.mark.parametrize("segmented", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", LAUNCHES)
def test_kernels_compile_for_gpus(make, segmented, capability):
    """The states of a piece stay in registers: three blocks of 128 threads share a multiprocessor's."""
    launch = make(RnnShape(64, 4096, 2048, "bfloat16", segmented), 1024)
    dtypes = tuple({"d": "bfloat16", "f": "float32", "i": "int32"}[letter] for letter in LAUNCHES[make].split())
    found = triton_compile.compile_launch(launch, dtypes, capability)
    assert launch.name in found.text
    assert found.registers <= 168 + 16 * segmented and found.spilled_bytes <= 64


@pytest.mark.parametrize(
    ("batch", "tokens", "width", "spans"),
    [(64, 4096, 2048, 2), (256, 1024, 2048, 1), (2, 131_072, 2048, 32), (1, 100, 8, 1), (1, 600, 8, 2)],
)
def test_rows_are_cut_where_they_are_few(batch, tokens, width, spans):
    span = triton_tiling.span_of(RnnShape(batch, tokens, width, "bfloat16", segmented=False))
    assert span % triton_tiling.PIECE == 0 and span * (spans - 1) < tokens <= span * spans


@pytest.mark.parametrize(
    ("change", "reason"), [({"dtype": "float64"}, "float64 is none of"), ({"batch": 70_000}, "65535")]
)
def test_unsupported_calls_say_why(change, reason):
    sizes = {"batch": 2, "tokens": 8, "width": 4, "dtype": "float32", "segmented": False}
    assert triton_tiling.unsupported_reason(RnnShape(**sizes)) is None
    assert reason in triton_tiling.unsupported_reason(RnnShape(**sizes | change))
    with pytest.raises(ValueError, match="every size must be 1 or more"):
        RnnShape(**sizes | {"width": 0})


def test_calls_are_traced_under_the_kernels_names():
    require_jax_triton()
    shape = RnnShape(2, 600, 16, "bfloat16", segmented=False)
    projected, bias = jnp.zeros((2, 600, 48), jnp.bfloat16), jnp.zeros(16)

    def both(projected, bias, d_out):
        out, pieces, last = triton.rnn_forward(shape, projected, bias, None, None)
        return out, last, triton.rnn_backward(shape, pieces, projected, bias, d_out, None)

    d_out = jnp.zeros((2, 600, 16), jnp.bfloat16)
    text = str(jax.make_jaxpr(both)(projected, bias, d_out))
    for make in LAUNCHES:
        assert make(shape, 304).name in text
    out, last, (d_projected, d_bias) = jax.eval_shape(both, projected, bias, d_out)
    assert (out.shape, out.dtype) == ((2, 600, 16), jnp.bfloat16)
    assert (last.shape, last.dtype) == ((2, 16), jnp.float32)
    assert (d_projected.shape, d_projected.dtype) == (projected.shape, jnp.bfloat16)
    assert (d_bias.shape, d_bias.dtype) == ((16,), jnp.float32)
