"""Projections of a single row, as GPUs run them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.layers import projection
from rat_jax.ops import platform
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
