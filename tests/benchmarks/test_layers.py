"""The layers that are timed: their decode steps do what their one pass does, and what is refused says why."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.layers import DTYPE, Sizes, decode, make_layer, make_params, step_bytes

SIZES = Sizes(width=32, heads=4, key_heads=2, groups=2, chunk_size=4, window=5)


@pytest.mark.parametrize("kind", ["rnn", "rat", "rat:xla", "rattention", "rattention:2"])
def test_steps_are_the_pass(kind):
    layer = make_layer(kind, SIZES)
    projected = jax.random.normal(jax.random.key(0), (2, 11, layer.channels), DTYPE)
    gate_bias = jax.random.normal(jax.random.key(1), (SIZES.width,))
    want = layer.mix(projected, gate_bias)
    step = jax.jit(layer.step)
    cache, out = layer.new_cache(2, 12), []
    for t in range(projected.shape[1]):
        mixed, cache = step(projected[:, t : t + 1], gate_bias, jnp.int32(t), cache)
        out.append(mixed)
    got, want = (np.asarray(x, np.float32) for x in (jnp.concatenate(out, axis=1), want))
    np.testing.assert_allclose(got, want, atol=2e-2)


def test_a_decode_loop_keeps_its_cache_in_place():
    layer = make_layer("rat", SIZES)
    cache = layer.new_cache(3, 16)
    x = jnp.ones((3, 1, SIZES.width), jnp.bfloat16)
    run = jax.jit(lambda *inputs: decode(layer, SIZES, 4, *inputs))
    out, after = run(make_params(layer.channels, SIZES.width), x, cache, jnp.int32(16))
    assert out.shape == x.shape and bool(jnp.isfinite(out).all())
    assert after.num_summaries.tolist() == [4, 4, 4]
    assert step_bytes(layer, SIZES, 3, 16) > step_bytes(layer, SIZES, 3, 8)


@pytest.mark.parametrize("kind", ["rat:other", "rat:xla:other", "other", "rattention:other", "local_attention:other"])
def test_unknown_layers_are_refused(kind):
    with pytest.raises(ValueError, match="other"):
        make_layer(kind, SIZES)
