"""Norms, projections of a single row and in parts, as GPUs run them, and rotations of whole rows."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.layers import project_parts, projection
from rat_jax.ops import platform
from rat_jax.ops.normed_product_xla import rms_norm
from rat_jax.ops.rope import rotate, rotate_tokens
from rat_jax.segments import as_segments, whole_rows
from tests.equations import equations


@pytest.mark.parametrize(("name", "num_rows"), [("cpu", 1), ("gpu", 2), ("tpu", 1)])
def test_a_single_row_is_taken_twice_where_a_gpu_is_expected(name, num_rows, monkeypatch):
    layer = projection(8, 6, jnp.dtype("float32"), nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (1, 1, 8))
    want = np.asarray(x[0, 0]) @ np.asarray(layer.kernel[...])
    monkeypatch.setattr(platform, "expected_platform", lambda: name)
    run = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x)).trace(params, x)
    products = [equation for equation in equations(run.jaxpr.jaxpr) if equation.primitive.name == "dot_general"]
    shapes = {equation.invars[0].aval.shape for equation in products}
    assert shapes == {(1, num_rows, 8)}
    got = run.lower().compile()(params, x)
    assert got.shape == (1, 1, 6)
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-6), ("bfloat16", 3e-3)])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_gradients_of_the_norm_are_those_of_float64(size, dtype, limit):
    rng = np.random.default_rng(0)
    x, d_out = (jnp.asarray(scale * rng.normal(size=(2, 5, 96)), dtype) for scale in (size, 1.0))
    scale = jnp.asarray(rng.uniform(0.1, 2.0, 96), jnp.float32)
    out, pull = jax.vjp(lambda x, scale: rms_norm(x, scale, 1e-6), x, scale)
    d_x, d_scale = pull(d_out)
    exact_x, exact_scale, d_out = (np.asarray(a, np.float64) for a in (x, scale, d_out))
    root = np.sqrt((exact_x**2).mean(-1, keepdims=True) + 1e-6)
    normed, scaled = exact_x / root, d_out * exact_scale
    wanted_x = (scaled - normed * (scaled * normed).mean(-1, keepdims=True)) / root
    assert (out.dtype, d_x.dtype, d_scale.dtype) == (x.dtype, x.dtype, jnp.float32)
    for a, b in ((out, normed * exact_scale), (d_x, wanted_x), (d_scale, (d_out * normed).sum((0, 1)))):
        assert np.linalg.norm(np.asarray(a, np.float64) - b) <= limit * np.linalg.norm(b)


def columns_of_products(function, x, *others):
    """Multiply-adds of all products by the numbers in x: columns of the matrix, or of what is put together for it."""
    found = equations(jax.make_jaxpr(function)(*others, x).jaxpr)
    products = [[v.aval.size for v in (*e.invars, *e.outvars)] for e in found if e.primitive.name == "dot_general"]
    return [math.isqrt(left * right * out) // x.size for left, right, out in products]


@pytest.mark.parametrize(
    ("tokens", "sizes", "separate"), [(5, (24, 8, 8), True), (1, (24, 8, 8), False), (5, (24, 12, 4), False)]
)
def test_parts_are_products_of_their_own_whose_gradients_are_put_together_once(tokens, sizes, separate):
    layer = projection(64, sum(sizes), jnp.dtype("float32"), nnx.Rngs(0))
    graphdef, params = nnx.split(layer)
    x = jax.random.normal(jax.random.key(1), (2, tokens, 64))
    weights = [jax.random.normal(jax.random.key(2 + i), (2, tokens, size)) for i, size in enumerate(sizes)]

    def loss(params, x):
        parts = project_parts(nnx.merge(graphdef, params), x, *sizes)
        return sum(jnp.sum(part * weight) for part, weight in zip(parts, weights, strict=True))

    def whole(params, x):
        return jnp.sum(nnx.merge(graphdef, params)(x) * jnp.concatenate(weights, axis=-1))

    forward = list(sizes) if separate else [sum(sizes)]
    assert columns_of_products(loss, x, params) == forward
    saving = jax.checkpoint(loss, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
    for function in (loss, saving):  # products that are saved are not made again
        assert columns_of_products(jax.grad(function, (0, 1)), x, params) == [*forward, *[sum(sizes)] * 2]
    found, wanted = (jax.jit(jax.value_and_grad(f, (0, 1)))(params, x) for f in (loss, whole))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), found, wanted)


def test_angles_are_those_of_one_row_where_all_rows_have_the_same():
    x = jax.random.normal(jax.random.key(0), (3, 7, 2, 8))
    whole, packed = whole_rows(3, 7), as_segments(jnp.array([[1] * 7, [1] * 3 + [2] * 4, [0] * 2 + [5] * 5]), (3, 7))
    for segments, rows in ((whole, 1), (packed, 3)):
        traced = jax.make_jaxpr(lambda x, segments=segments: rotate_tokens(x, segments, 100.0))(x)
        angles = [e.outvars[0].aval.shape for e in equations(traced.jaxpr) if e.primitive.name in ("cos", "sin")]
        assert angles == [(rows, 7, 4)] * 2
        wanted = rotate(x, segments.positions, 100.0)
        np.testing.assert_array_equal(rotate_tokens(x, segments, 100.0), wanted)
