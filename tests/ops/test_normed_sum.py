"""The normed sum: its values and gradients by any implementation, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.ops import UnsupportedError, normed_sum, platform
from tests.jax_triton import require_jax_triton

IMPLEMENTATIONS = ["xla", pytest.param("triton", marks=pytest.mark.gpu)]


def arrays(tokens, heads=3, head_dim=24, dtype=jnp.float32):
    """Both arrays, of sizes 0.1 and 2, their scales and the gradient of the result."""
    rng = np.random.default_rng(tokens)
    draws = [size * rng.normal(size=(2, tokens, heads, head_dim)) for size in (0.1, 2.0, 1.0)]
    first, second, d_out = (jnp.asarray(x, dtype) for x in draws)
    scales = [jnp.asarray(rng.uniform(0.1, 2.0, heads * head_dim), jnp.float32) for _ in range(2)]
    return (first, second, *scales), d_out


def expected(arrays, d_out, epsilon):
    """Values and gradients in float64, by their definitions."""
    first, second, *scales = (np.asarray(x, np.float64) for x in arrays)
    d_out, total, d_arrays, d_scales = np.asarray(d_out, np.float64), 0.0, [], []
    for x, scale in zip((first, second), scales, strict=True):
        scale = scale.reshape(x.shape[2:])
        root = np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
        total = total + x / root * scale
        d_scales.append((d_out * x / root).sum((0, 1)).ravel())
        d_normed = d_out * scale
        d_arrays.append(d_normed / root - x * (d_normed * x).mean(-1, keepdims=True) / root**3)
    return total, *d_arrays, *d_scales


def found_by(implementation, arrays, d_out, epsilon):
    """Values and gradients of the op."""

    def both(d_out, *arrays):
        out, pull = jax.vjp(lambda *x: normed_sum(*x, epsilon=epsilon, implementation=implementation), *arrays)
        return out, *pull(d_out)

    return jax.jit(both)(d_out, *arrays)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("tokens", "epsilon"), [(1, 1e-8), (77, 1e-2)])
def test_values_and_gradients_are_those_of_float64(implementation, tokens, epsilon):
    given, d_out = arrays(tokens)
    wanted = expected(given, d_out, epsilon)
    for a, b in zip(found_by(implementation, given, d_out, epsilon), wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(("tokens", "heads", "head_dim"), [(1, 3, 24), (1000, 16, 128), (333, 2, 64), (40, 3, 256)])
def test_kernels_err_at_most_twice_as_much_as_plain_xla(tokens, heads, head_dim, dtype):
    given, d_out = arrays(tokens, heads, head_dim, dtype)
    wanted = expected(given, d_out, 1e-8)
    errors = {
        name: [
            np.linalg.norm(np.asarray(a, np.float64) - b) / np.linalg.norm(b)
            for a, b in zip(found_by(name, given, d_out, 1e-8), wanted, strict=True)
        ]
        for name in ("xla", "triton")
    }
    assert all(a <= 2 * b + 1e-7 for a, b in zip(errors["triton"], errors["xla"], strict=True)), errors


def test_the_kernels_are_traced_for_a_gpu_but_of_one_token(monkeypatch):
    require_jax_triton()
    monkeypatch.setattr(platform, "expected_platform", lambda: "gpu")
    for implementation, tokens, is_kernel in (
        ("triton", 40, True),
        (None, 40, True),
        (None, 1, False),
        ("xla", 40, False),
    ):

        def loss(*arrays, implementation=implementation):
            return normed_sum(*arrays, epsilon=1e-8, implementation=implementation).astype(jnp.float32).sum()

        text = str(jax.jit(jax.grad(loss)).trace(*arrays(tokens)[0]).jaxpr)
        assert all((name in text) == is_kernel for name in ("normed_sum_forward", "normed_sum_backward"))


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused():
    first, second, s, r = arrays(8)[0]

    def call(*arrays, epsilon=1e-8, implementation=None):
        return lambda: normed_sum(*arrays, epsilon=epsilon, implementation=implementation)

    for refused, error, message in (
        (call(first[0], second[0], s, r), ValueError, r"first must be \[batch, tokens, heads, channels\]"),
        (call(first, second[:, :7], s, r), ValueError, "first and second must have one shape"),
        (call(first, second, s, r[1:]), ValueError, r"second_scale must be \[N H\] = \(72,\), got \(71,\)"),
        (call(first[:, :0], second[:, :0], s, r), ValueError, "tokens must be a whole number of 1 or more"),
        (call(first.astype(int), second, s, r), ValueError, "first must be of floating numbers"),
        (call(first, second, s, r, epsilon=0.0), ValueError, "epsilon must be above 0, got 0.0"),
        (call(first, second, s, r, implementation="triton"), UnsupportedError, "it runs on NVIDIA GPUs"),
        (
            call(first, second.astype(jnp.bfloat16), s, r, implementation="triton"),
            UnsupportedError,
            "first and second differ in dtype: float32, bfloat16",
        ),
        (call(first, second, s, r, implementation="cudnn"), UnsupportedError, "must be one of xla, triton"),
    ):
        with pytest.raises(error, match=message):
            refused()
