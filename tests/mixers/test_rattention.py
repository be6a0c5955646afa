"""The RAttention mixer against the loops, and a cache that does not grow."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.errors import ConfigError
from rat_jax.mixers import Rattention
from tests import reference
from tests.small import small_model_config

TOKENS, WIDTH, HEADS, HEAD_DIM = 13, 16, 4, 4


def new_mixer(options, **changes):
    config = small_model_config(("rattention",), **changes)
    settings = dataclasses.replace(config.mixers["rattention"], **options)
    graphdef, params = nnx.split(Rattention.from_config(settings, config, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(1)  # uneven norms and scales, large weights
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.float32(0.5 * rng.standard_normal(x.shape) + 0.3), params))


def expected(mixer, x):
    p = {"/".join(path): np.asarray(value[...], np.float64) for path, value in nnx.to_flat_state(nnx.state(mixer))}
    config, options = mixer.shape, mixer.config
    kv_width = config.kv_heads * HEAD_DIM
    shared = HEADS // config.kv_heads
    q, k, v = np.split(x @ p["in_proj/kernel"], [WIDTH, WIDTH + kv_width], axis=-1)
    q, k, v = (part.reshape(*x.shape[:2], -1, HEAD_DIM) for part in (q, k, v))
    if config.qk_norm:
        q, k = (reference.rms_norm(part, p[f"{name}_norm/scale"]) for part, name in ((q, "query"), (k, "key")))
    rope_base = options.rope_base if options.rope else None
    local = reference.attention(q, *(np.repeat(part, shared, axis=2) for part in (k, v)), options.window, rope_base)
    key_scale = np.ones((config.kv_heads, HEAD_DIM))
    if options.learned_scales:
        q, key_scale = q * p["query_scale"].reshape(HEADS, -1), p["key_scale"].reshape(-1, HEAD_DIM)

    def features(x):
        if options.feature_map == "relu":
            return np.concatenate([np.maximum(x, 0), np.maximum(-x, 0)])
        return np.concatenate([reference.softmax(x), reference.softmax(-x)])

    state = np.zeros((len(x), HEADS, 2 * HEAD_DIM, HEAD_DIM))
    for m in range(options.meta_tokens):
        for n in range(HEADS):
            head = n // shared
            key, value = (
                p[f"meta_{name}"].reshape(-1, config.kv_heads, HEAD_DIM)[m, head] for name in ("key", "value")
            )
            state[:, n] += np.outer(features(key * key_scale[head]), value)
    linear, _ = reference.residual_linear_attention(q, k * key_scale, v, state, options.window, options.feature_map)
    mixed = sum(
        reference.rms_norm(branch, 1.0, epsilon=1e-8) * p[f"{name}_norm/scale"].reshape(HEADS, HEAD_DIM)
        for branch, name in ((local, "local"), (linear, "linear"))
    )
    return mixed.reshape(x.shape) @ p["out_proj/kernel"]


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        ({"meta_tokens": 3, "learned_scales": True}, {"num_kv_heads": 2, "qk_norm": True}),
        ({"meta_tokens": 2, "learned_scales": False, "feature_map": "relu", "window": 0}, {"num_kv_heads": 1}),
        ({"meta_tokens": 0, "learned_scales": True, "rope": False, "window": 7}, {}),
    ],
)
def test_equals_the_loops(options, changes):
    mixer = new_mixer(options, **changes)
    x = np.random.default_rng(2).standard_normal((2, TOKENS, WIDTH))
    graphdef, params = nnx.split(mixer)
    mix = jax.jit(lambda params, x: nnx.merge(graphdef, params)(x))
    want = expected(mixer, x)
    np.testing.assert_allclose(mix(params, jnp.float32(x)), want, atol=1e-5 * np.abs(want).max())


def test_branches_start_from_their_scale():
    mixer = Rattention(WIDTH, HEADS, branch_scale=0.1, rngs=nnx.Rngs(0))
    for norm in (mixer.local_norm, mixer.linear_norm):
        np.testing.assert_array_equal(norm.scale[...], np.full(WIDTH, 0.1, np.float32))
    with pytest.raises(ConfigError, match="branch_scale must be above 0, got 0"):
        Rattention(WIDTH, HEADS, branch_scale=0.0, rngs=nnx.Rngs(0))


def test_cache_holds_the_window_and_a_state_whatever_the_length():
    mixer = new_mixer({"window": 4}, num_kv_heads=2)
    sizes = [
        sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda n=n: mixer.init_memory(3, n))))
        for n in (5, 1 << 10, 1 << 20)
    ]
    assert sizes == [3 * (5 * 2 * 2 * HEAD_DIM + 2 * 2 * HEAD_DIM * HEAD_DIM)] * 3
