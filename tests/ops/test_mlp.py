"""The MLP with its GELU in kernels: values and gradients, when it is chosen, and what is kept for gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pallas_kernels.mlp import mosaic_gpu, mosaic_gpu_tiling
from pallas_kernels.mlp.mosaic_gpu_tiling import DOWN_BACKWARD, UP, tiling_reason, unsupported_reason
from pallas_kernels.mlp.shape import MlpShape
from rat_jax.blocks import Mlp
from rat_jax.model import LanguageModel
from rat_jax.ops import UnsupportedError, gelu_mlp
from tests import reference
from tests.abstract_mesh import abstract_mesh
from tests.equations import equations
from tests.ops.devices import take_cpu_for_hopper, trace_for
from tests.pallas_kernels import mosaic_emulator
from tests.small import small_model_config


def arrays(batch=2, tokens=1024, width=384, hidden=256, dtype=jnp.bfloat16):
    """Tokens, weights and a gradient of the result."""
    keys = jax.random.split(jax.random.key(0), 4)
    up = 2 * jax.random.normal(keys[1], (width, hidden)) / width**0.5
    down = jax.random.normal(keys[2], (hidden, width)) / hidden**0.5
    x, d_out = (jax.random.normal(key, (batch, tokens, width)).astype(dtype) for key in (keys[0], keys[3]))
    return x, up, down, d_out


def result_and_gradients(x, up, down, d_out, dtype=jnp.bfloat16, **options):
    out, pull_back = jax.vjp(lambda *given: gelu_mlp(*given, dtype=dtype, **options), x, up, down)
    return out, *pull_back(d_out.astype(dtype))


def check_errors(given, **options):
    """Errors are at most twice those of plain XLA, to float32, of their norm."""
    exact = result_and_gradients(*(x.astype(jnp.float32) for x in given), dtype=jnp.float32, implementation="xla")
    plain = result_and_gradients(*given, implementation="xla")
    found = result_and_gradients(*given, **options)
    for got, xla, want in zip(found, plain, exact, strict=True):
        assert (got.dtype, got.shape) == (xla.dtype, xla.shape)
        error, limit = (np.linalg.norm(np.float32(value) - want) / np.linalg.norm(want) for value in (got, xla))
        assert 0 < error < 2 * limit < 2e-2


def test_values_are_those_of_float64():
    x, up, down, _ = arrays(2, 3, 8, 5, jnp.float32)
    exact = [np.asarray(value, np.float64) for value in (x, up, down)]
    np.testing.assert_allclose(
        gelu_mlp(x, up, down), reference.gelu(exact[0] @ exact[1]) @ exact[2], rtol=1e-5, atol=1e-6
    )


def is_kernel(x, up, down, _=None, **options) -> bool:
    traced = jax.jit(lambda *given: gelu_mlp(*given, dtype=x.dtype, **options)).trace(x, up, down)
    return "mlp_up_mosaic" in str(traced.jaxpr)


def sizes(**changes):
    return jax.eval_shape(lambda: arrays(**changes))


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({}, True),
        ({"batch": 8, "tokens": 4096, "width": 2048, "hidden": 8192}, True),
        ({"batch": 1024, "tokens": 2}, True),
        ({"dtype": jnp.float16}, True),
        ({"batch": 2048, "tokens": 1}, False),
        ({"dtype": jnp.float32}, False),
        ({"tokens": 1000}, False),
        ({"batch": 1}, False),
        ({"width": 416}, False),
        ({"width": 320}, False),
        ({"hidden": 384}, False),
    ],
    ids=str,
)
def test_the_kernels_are_chosen_for_whole_tiles_of_more_than_one_token(changes, chosen, monkeypatch):
    trace_for(monkeypatch, "gpu", (9, 0))
    assert is_kernel(*sizes(**changes)) == chosen
    assert not is_kernel(*sizes(**changes), implementation="xla")


@pytest.mark.parametrize("found", [("gpu", (8, 0)), ("gpu", (10, 0)), ("gpu", None), ("tpu", None), ("cpu", None)])
def test_the_kernels_are_chosen_for_hopper_alone(found, monkeypatch):
    trace_for(monkeypatch, *found)
    assert not is_kernel(*sizes())


@pytest.mark.parametrize("axis", ["data", "fsdp"])
def test_each_device_runs_the_kernels_on_its_rows(axis, monkeypatch):
    trace_for(monkeypatch, "gpu", (9, 0))
    with jax.sharding.use_abstract_mesh(abstract_mesh(**{axis: 4})):
        given = sizes(batch=8)
        traced = jax.make_jaxpr(result_and_gradients)(*given)
        assert not is_kernel(*sizes(batch=4))  # 1,024 tokens a device
    kernels = [e for e in equations(traced.jaxpr) if str(e.params.get("name")).startswith("mlp_")]
    assert [kernel.outvars[0].aval.shape for kernel in kernels] == [(2048, 256)] * 2


@pytest.mark.parametrize("axis", ["context", "tensor"])
def test_the_kernels_are_not_chosen_where_a_mesh_cuts_rows_or_matrices(axis, monkeypatch):
    trace_for(monkeypatch, "gpu", (9, 0))
    with jax.sharding.use_abstract_mesh(abstract_mesh(**{axis: 4})):
        assert not is_kernel(*sizes(batch=8))
        with pytest.raises(UnsupportedError, match="cuts rows or matrices over 4 devices; implementation 'xla' takes"):
            is_kernel(*sizes(batch=8), implementation="mosaic_gpu")


def test_named_kernels_say_why_they_do_not_run(monkeypatch):
    with pytest.raises(UnsupportedError, match="it runs on NVIDIA GPUs, and this program is traced for the cpu"):
        is_kernel(*sizes(), implementation="mosaic_gpu")
    trace_for(monkeypatch, "gpu", (9, 0))
    assert is_kernel(*sizes(batch=2048, tokens=1), implementation="mosaic_gpu")
    for changes, message in (
        ({"tokens": 1000}, "2000 tokens of all rows are no multiple of 2048; implementation 'xla' takes them"),
        ({"hidden": 128}, "128 hidden units are no multiple of 256; implementation 'xla' takes them"),
        ({"width": 320}, "width 320 is no multiple of 64 from 384 on; implementation 'xla' takes it"),
        ({"dtype": jnp.float32}, "dtype float32 is none of bfloat16, float16"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            is_kernel(*sizes(**changes), implementation="mosaic_gpu")
    trace_for(monkeypatch, "gpu", (8, 0))
    with pytest.raises(UnsupportedError, match=r"compute capability 9\.x, this one has 8\.0"):
        is_kernel(*sizes(), implementation="mosaic_gpu")


def test_sizes_that_are_taken_can_be_cut():
    taken = 0
    for tokens in range(256, 8192, 256):
        for width in range(64, 1024, 32):
            for hidden in (64, 128, 256, 384, 512, 640, 768):
                shape = MlpShape(tokens, width, hidden)
                reasons = tiling_reason(shape, UP), tiling_reason(shape, DOWN_BACKWARD)
                assert (unsupported_reason(shape) is None) == (reasons == (None, None))
                taken += reasons == (None, None)
    assert taken > 50


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused():
    x, up, down, _ = arrays(1, 2, 128, 64)
    for call, message in (
        (lambda: gelu_mlp(x[0], up, down), r"x must be \[B, T, D\], up \[D, F\] and down \[F, D\], got \(2, 128\)"),
        (lambda: gelu_mlp(x, up[1:], down), r"x must be \[B, T, D\], up \[D, F\] and down"),
        (lambda: gelu_mlp(x, up, down[1:]), r"x must be \[B, T, D\], up \[D, F\] and down"),
        (lambda: gelu_mlp(x, up.astype(int), down), "up must be of floating numbers"),
        (lambda: gelu_mlp(x[:, :0], up, down), "tokens must be a whole number of 1 or more"),
        (lambda: gelu_mlp(x, up, down, implementation="cuda"), "must be one of xla, mosaic"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_what_is_traced_for_hopper_is_lowered_for_it_and_plain_elsewhere(monkeypatch):
    given = arrays()
    plain = jax.jit(lambda *given: result_and_gradients(*given, implementation="xla"))(*given)
    trace_for(monkeypatch, "gpu", (9, 0))
    traced = jax.jit(result_and_gradients).trace(*given)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mlp_up_mosaic" in text
    assert "mlp_down_backward_mosaic" in text
    out, d_x, *d_matrices = traced.lower().compile()(*given)
    for found, want in zip((out, d_x), plain, strict=False):
        np.testing.assert_array_equal(found, want)
    exact = result_and_gradients(*(x.astype(jnp.float32) for x in given), dtype=jnp.float32, implementation="xla")
    for found, want in zip(d_matrices, exact[2:], strict=True):  # their tokens are summed up in another order
        assert np.linalg.norm(found - want) < 4e-3 * np.linalg.norm(want)


@pytest.fixture
def as_hopper(monkeypatch):
    take_cpu_for_hopper(monkeypatch)


@pytest.mark.usefixtures("as_hopper")
def test_emulated_kernels_err_as_xla_does(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_tiling, "UP", dataclasses.replace(UP, band=1))
    monkeypatch.setattr(mosaic_gpu_tiling, "DOWN_BACKWARD", dataclasses.replace(DOWN_BACKWARD, band=1))
    calls = []

    def noting(name, run):
        def launch(shape, *given):
            calls.append((name, shape.tokens, shape.width, shape.hidden))
            return run(shape, *given)

        monkeypatch.setattr(mosaic_gpu, name, launch)

    noting("up", mosaic_gpu.up)
    noting("down_backward", mosaic_gpu.down_backward)
    mosaic_emulator.install(monkeypatch, seed=0, all_used=True)
    check_errors(arrays(2, 256, 384, 256), implementation="mosaic_gpu")
    assert calls == [("up", 512, 384, 256), ("down_backward", 512, 384, 256)]


@pytest.mark.usefixtures("as_hopper")
@pytest.mark.parametrize(
    ("kind", "tokens", "chosen"), [("gelu", 1024, True), ("gelu", 1, False), ("geglu", 1024, False)]
)
def test_modules_take_the_kernels_for_more_than_one_token_without_gates(kind, tokens, chosen):
    config = small_model_config(("rnn",), width=384, num_heads=2, mlp_width=256, mlp_kind=kind, dtype="bfloat16")
    mlp = nnx.eval_shape(lambda: Mlp(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(mlp)
    x = jax.ShapeDtypeStruct((2048 // tokens, tokens, 384), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)
    assert ("mlp_up_mosaic" in str(jaxpr)) == chosen


@pytest.mark.usefixtures("as_hopper")
@pytest.mark.parametrize(("remat", "times"), [("none", 1), ("dots", 1), ("block", 2)])
def test_what_gelu_takes_is_kept_with_the_results_of_products(remat, times):
    config = small_model_config(
        ("rnn",), width=384, num_heads=2, num_layers=1, mlp_width=256, dtype="bfloat16", remat=remat
    )
    graphdef, params = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))

    def loss(params, tokens):
        return nnx.merge(graphdef, params)(tokens).astype(jnp.float32).sum()

    traced = jax.make_jaxpr(jax.grad(loss))(params, jax.ShapeDtypeStruct((2, 1024), jnp.int32))
    names = [equation.params.get("name") for equation in equations(traced.jaxpr)]
    assert names.count("mlp_up_mosaic") == times
    assert names.count("mlp_down_backward_mosaic") == 1


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_kernels_on_a_gpu_err_as_xla_does():
    given = arrays(2, 2048, 512, 1024)
    assert is_kernel(*given)
    with jax.default_matmul_precision("highest"):
        check_errors(given)
