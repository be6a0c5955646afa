"""The residual norm: its values and gradients by any implementation, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.ops import UnsupportedError, platform, residual_norm
from tests.abstract_mesh import abstract_mesh
from tests.equations import equations
from tests.jax_triton import require_jax_triton

IMPLEMENTATIONS = ["xla", pytest.param("triton", marks=pytest.mark.gpu)]


def arrays(tokens, width=24, dtype=jnp.float32, batch=2):
    """Tokens and scale, and the gradients of both results."""
    rng = np.random.default_rng(tokens)
    x, d_around, d_normed = (jnp.asarray(rng.normal(size=(batch, tokens, width)), dtype) for _ in range(3))
    return (x, jnp.asarray(rng.uniform(0.1, 2.0, width), jnp.float32)), (d_around, d_normed)


def expected(given, d_results, epsilon):
    """Values and gradients in float64, by their definitions."""
    x, scale, d_around, d_normed = (np.asarray(x, np.float64) for x in (*given, *d_results))
    root = np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    d_unit = d_normed * scale
    d_x = d_around + d_unit / root - x * (d_unit * x).mean(-1, keepdims=True) / root**3
    return x, x / root * scale, d_x, (d_normed * x / root).sum((0, 1))


def found_by(implementation, given, d_results, epsilon):
    """Values and gradients of the op."""

    def both(given, d_results):
        out, pull = jax.vjp(lambda *x: tuple(residual_norm(*x, epsilon=epsilon, implementation=implementation)), *given)
        return *out, *pull(d_results)

    return jax.jit(both)(given, d_results)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "epsilon"), [(1, 1e-6), (77, 1e-2)])
def test_values_and_gradients_are_those_of_float64(implementation, tokens, epsilon):
    given, d_results = arrays(tokens)
    wanted = expected(given, d_results, epsilon)
    for a, b in zip(found_by(implementation, given, d_results, epsilon), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 24), (1000, 2048), (333, 384), (40, 8192)])
def test_the_kernel_errs_at_most_twice_as_much_as_plain_xla(tokens, width, dtype):
    given, d_results = arrays(tokens, width, dtype)
    wanted = expected(given, d_results, 1e-6)
    errors = {
        name: [
            np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
            for a, b in zip(found_by(name, given, d_results, 1e-6), wanted, strict=True)
        ]
        for name in ("xla", "triton")
    }
    assert all(a <= 2 * b + 1e-7 for a, b in zip(errors["triton"], errors["xla"], strict=True)), errors


def traced(given, d_results, implementation=None):
    def both(given, d_results):
        out, pull = jax.vjp(lambda *x: tuple(residual_norm(*x, epsilon=1e-6, implementation=implementation)), *given)
        return *out, *pull(d_results)

    return jax.jit(both).trace(given, d_results)


def test_the_kernel_is_traced_for_a_gpu_but_of_one_token(monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    for implementation, tokens, is_kernel in (
        ("triton", 40, True),
        (None, 40, True),
        (None, 1, False),
        ("xla", 40, False),
    ):
        text = str(traced(*arrays(tokens), implementation).jaxpr)
        assert ("residual_norm_backward" in text) == is_kernel


def test_what_is_traced_for_a_gpu_runs_elsewhere_as_plain_xla_does(monkeypatch):
    require_jax_triton()
    given = arrays(40)
    plain = traced(*given).lower().compile()(*given)
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    found = traced(*given)
    assert "residual_norm_backward" in str(found.jaxpr)
    for a, b in zip(found.lower().compile()(*given), plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", ["data", "fsdp", "context", "tensor"])
def test_each_device_runs_the_kernel_on_its_rows_where_these_are_whole(axis, monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    with jax.sharding.use_abstract_mesh(abstract_mesh(**{axis: 4})):
        given = arrays(40, batch=8)
        calls = [e for e in equations(traced(*given).jaxpr.jaxpr) if e.params.get("name") == "residual_norm_backward"]
        whole = axis in ("data", "fsdp")
        assert {call.outvars[0].aval.shape for call in calls} == ({(2 * 40, 24)} if whole else set())
        if not whole:
            with pytest.raises(UnsupportedError, match="cuts tokens or heads; implementation 'xla' takes them"):
                traced(*given, "triton")


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused():
    x, scale = arrays(8)[0]

    def call(x, scale, epsilon=1e-6, implementation=None):
        return lambda: residual_norm(x, scale, epsilon=epsilon, implementation=implementation)

    for refused, error, message in (
        (call(x[0], scale), ValueError, r"x must be \[B, T, D\] and scale \[D\], got \(8, 24\)"),
        (call(x, scale[1:]), ValueError, r"x must be \[B, T, D\] and scale \[D\]"),
        (call(x[:, :0], scale), ValueError, "tokens must be a whole number of 1 or more"),
        (call(x.astype(int), scale), ValueError, "x must be of floating numbers"),
        (call(x, scale, epsilon=0.0), ValueError, "epsilon must be above 0, got 0.0"),
        (call(x, scale, implementation="triton"), UnsupportedError, "it runs on NVIDIA GPUs"),
        (call(x, scale, implementation="cudnn"), UnsupportedError, "must be one of xla, triton"),
    ):
        with pytest.raises(error, match=message):
            refused()
