"""The kinds of MLP against NumPy."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.blocks import Mlp
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
