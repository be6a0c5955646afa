"""The kinds of MLP against NumPy, and blocks of single tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.blocks import Mlp, ResidualBlock
from rat_jax.segments import whole_rows
from tests import reference
from tests.small import small_model_config


def silu(x):
    return x * reference.sigmoid(x)


@pytest.mark.parametrize(
    ("kind", "activation"), [("gelu", reference.gelu), ("geglu", reference.gelu), ("swiglu", silu)]
)
def test_mlp(kind, activation):
    mlp = Mlp(small_model_config(("rnn",), mlp_kind=kind, mlp_width=24), rngs=nnx.Rngs(0))
    up, down = (50 * np.asarray(layer.kernel[...], np.float64) for layer in (mlp.up, mlp.down))
    mlp.up.kernel[...], mlp.down.kernel[...] = jnp.float32(up), jnp.float32(down)
    x = np.random.default_rng(0).standard_normal((2, 3, 16))
    assert up.shape == (16, 24 if kind == "gelu" else 48)
    hidden = activation(x @ up[:, :24]) * (1 if kind == "gelu" else x @ up[:, 24:])
    np.testing.assert_allclose(mlp(jnp.float32(x)), hidden @ down, rtol=1e-4, atol=1e-4)


def test_projections_that_are_more_than_a_matrix_are_called():
    """A launch of all between two mixers multiplies matrices alone."""
    config = small_model_config(("rnn",))
    block = ResidualBlock("rnn", config, rngs=nnx.Rngs(0))
    assert block.first_product is not None
    for name in ("in_proj", "out_proj"):
        linear = getattr(block.mixer, name)
        biased = nnx.Linear(linear.in_features, linear.out_features, rngs=nnx.Rngs(1))
        biased.bias[...] = biased.bias[...] + 1
        setattr(block.mixer, name, biased)
    x = jax.random.normal(jax.random.key(0), (2, 3, config.width))
    whole, first = (block(x[:, :n], whole_rows(2, n))[0] for n in (3, 1))
    np.testing.assert_allclose(first, whole[:, :1], rtol=1e-5, atol=1e-5)
    assert block.first_product is None
