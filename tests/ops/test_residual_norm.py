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


def arrays(tokens, width=24, dtype=jnp.float32, batch=2, is_sum=True):
    """Tokens, scale and what is added, if anything, and the gradients of both results."""
    rng = np.random.default_rng(tokens)
    x, added, d_around, d_normed = (jnp.asarray(rng.normal(size=(batch, tokens, width)), dtype) for _ in range(4))
    scale = jnp.asarray(rng.uniform(0.1, 2.0, width), jnp.float32)
    return (x, scale, added) if is_sum else (x, scale), (d_around, d_normed)


def expected(given, d_results, epsilon):
    """Values and gradients in float64, by their definitions."""
    x, scale, *added = (np.asarray(x, np.float64) for x in given)
    d_around, d_normed = (np.asarray(x, np.float64) for x in d_results)
    x = x + sum(added)
    root = np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    d_unit = d_normed * scale
    d_x = d_around + d_unit / root - x * (d_unit * x).mean(-1, keepdims=True) / root**3
    return x, x / root * scale, d_x, (d_normed * x / root).sum((0, 1)), *(d_x for _ in added)


def values_and_gradients(given, d_results, implementation=None, epsilon=1e-6):
    """Of the op, with the gradients of all that it was given."""

    def op(x, scale, added=None):
        return tuple(residual_norm(x, scale, added=added, epsilon=epsilon, implementation=implementation))

    out, pull = jax.vjp(op, *given)
    return *out, *pull(d_results)


def found_by(implementation, given, d_results, epsilon):
    return jax.jit(lambda *x: values_and_gradients(*x, implementation, epsilon))(given, d_results)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("is_sum", [True, False])
@pytest.mark.parametrize(("tokens", "epsilon"), [(1, 1e-6), (77, 1e-2)])
def test_values_and_gradients_are_those_of_float64(implementation, tokens, epsilon, is_sum):
    given, d_results = arrays(tokens, is_sum=is_sum)
    wanted = expected(given, d_results, epsilon)
    found = found_by(implementation, given, d_results, epsilon)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("tokens", "width"), [(1, 24), (1000, 2048), (333, 384), (40, 8192)])
def test_the_kernels_err_at_most_twice_as_much_as_plain_xla(tokens, width, dtype):
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
    return jax.jit(lambda *x: values_and_gradients(*x, implementation)).trace(given, d_results)


KERNELS = {"residual_norm_forward", "residual_norm_backward"}


def kernels_of(jaxpr) -> list:
    return [equation for equation in equations(jaxpr) if equation.params.get("name") in KERNELS]


def test_the_kernels_are_traced_for_a_gpu_but_of_one_token(monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    for implementation, tokens, is_sum, wanted in (
        ("triton", 40, True, KERNELS),
        (None, 40, True, KERNELS),
        (None, 40, False, {"residual_norm_backward"}),
        (None, 1, True, set()),
        ("xla", 40, True, set()),
    ):
        found = kernels_of(traced(*arrays(tokens, is_sum=is_sum), implementation).jaxpr.jaxpr)
        assert {call.params["name"] for call in found} == wanted


@pytest.mark.parametrize("is_sum", [True, False])
def test_what_is_traced_for_a_gpu_runs_elsewhere_as_plain_xla_does(is_sum, monkeypatch):
    require_jax_triton()
    given = arrays(40, is_sum=is_sum)
    plain = traced(*given).lower().compile()(*given)
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    found = traced(*given)
    assert kernels_of(found.jaxpr.jaxpr)
    for a, b in zip(found.lower().compile()(*given), plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("axis", ["data", "fsdp", "context", "tensor"])
def test_each_device_runs_the_kernels_on_its_rows_where_these_are_whole(axis, monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    with jax.sharding.use_abstract_mesh(abstract_mesh(**{axis: 4})):
        given = arrays(40, batch=8)
        calls = kernels_of(traced(*given).jaxpr.jaxpr)
        whole = axis in ("data", "fsdp")
        assert {call.params["name"] for call in calls} == (KERNELS if whole else set())
        assert {call.outvars[0].aval.shape for call in calls} == ({(2 * 40, 24)} if whole else set())
        if not whole:
            with pytest.raises(UnsupportedError, match="cuts tokens or heads; implementation 'xla' takes them"):
                traced(*given, "triton")


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused():
    x, scale = arrays(8, is_sum=False)[0]

    def call(x, scale, epsilon=1e-6, **options):
        return lambda: residual_norm(x, scale, epsilon=epsilon, **options)

    for refused, error, message in (
        (call(x[0], scale), ValueError, r"x must be \[B, T, D\] and scale \[D\], got \(8, 24\)"),
        (call(x, scale[1:]), ValueError, r"x must be \[B, T, D\] and scale \[D\]"),
        (call(x[:, :0], scale), ValueError, "tokens must be a whole number of 1 or more"),
        (call(x.astype(int), scale), ValueError, "x must be of floating numbers"),
        (
            call(x, scale, added=x[:1]),
            ValueError,
            r"added must be as x is, float32 \(2, 8, 24\), got float32 \(1, 8, 24",
        ),
        (call(x, scale, added=x.astype(jnp.bfloat16)), ValueError, "added must be as x is, float32 .*, got bfloat16"),
        (call(x, scale, epsilon=0.0), ValueError, "epsilon must be above 0, got 0.0"),
        (call(x, scale, implementation="triton"), UnsupportedError, "it runs on NVIDIA GPUs"),
        (call(x, scale, implementation="cudnn"), UnsupportedError, "must be one of xla, triton"),
    ):
        with pytest.raises(error, match=message):
            refused()
