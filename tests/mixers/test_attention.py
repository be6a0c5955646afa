"""Options of the softmax mixers against the loops: shared key heads, normed queries and keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.mixers import MIXERS
from tests import reference
from tests.small import small_model_config


@pytest.mark.parametrize("kind", ["attention", "local_attention"])
def test_grouped_heads_and_normed_queries_and_keys(kind):
    config = small_model_config((kind,), num_kv_heads=2, qk_norm=True)
    graphdef, params = nnx.split(MIXERS[kind].from_config(config.mixers[kind], config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.float32(0.5 * rng.standard_normal(x.shape) + 0.3), params)
    p = {"/".join(path): np.asarray(value[...], np.float64) for path, value in nnx.to_flat_state(params)}
    x = rng.standard_normal((2, 13, 16))
    assert p["in_proj/kernel"].shape == (16, 8 + 16 + 8)
    v, q, k = (part.reshape(2, 13, -1, 4) for part in np.split(x @ p["in_proj/kernel"], [8, 24], axis=-1))
    q, k = reference.rms_norm(q, p["query_norm/scale"]), reference.rms_norm(k, p["key_norm/scale"])
    k, v = np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)
    mixed = reference.attention(q, k, v, 5 if kind == "local_attention" else None, rope_base=10_000.0)
    want = mixed.reshape(2, 13, 16) @ p["out_proj/kernel"]
    out = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))(params, jnp.float32(x))
    np.testing.assert_allclose(out, want, atol=1e-5 * np.abs(want).max())
