"""What every kind of mixer holds when it is used alone, as models use it."""

import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.errors import ConfigError
from rat_jax.mixers import MIXERS, kind_of
from tests.small import SETTINGS

BATCH, TOKENS, WIDTH = 2, 11, 16
SEGMENTS = [[1] * 4 + [2] * 7, [0] * 2 + [3] * 9]


def new_layer(kind, **changes):
    return MIXERS[kind](width=WIDTH, num_heads=4, **SETTINGS.get(kind, {}), **changes, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module", params=MIXERS)
def layer(request):
    """With weights large enough that every part of it matters."""
    graphdef, params = nnx.split(new_layer(request.param))
    return nnx.merge(graphdef, jax.tree.map(lambda x: 10 * x if x.ndim >= 2 else x, params))


@pytest.fixture(scope="module")
def compiled(layer):
    graphdef, params = nnx.split(layer)
    call = jax.jit(lambda params, x, ids: nnx.merge(graphdef, params)(x, segment_ids=ids))
    extend = jax.jit(lambda params, *arguments: nnx.merge(graphdef, params).extend(*arguments))
    return lambda x, ids=None: call(params, x, ids), lambda x, cache, ids=None: extend(params, x, cache, ids)


def inputs():
    return jax.random.normal(jax.random.key(0), (BATCH, TOKENS, WIDTH))


def test_pieces_are_the_whole(layer, compiled):
    call, extend = compiled
    x = inputs()
    cache, pieces = layer.init_cache(batch_size=BATCH, capacity=TOKENS), []
    for piece in (x[:, :6], x[:, 6:7], x[:, 7:8], x[:, 8:]):
        y, cache = extend(piece, cache)
        pieces.append(y)
    want = call(x)
    assert want.shape == x.shape
    np.testing.assert_allclose(jnp.concatenate(pieces, axis=1), want, atol=1e-5 * np.abs(want).max())


def test_documents_do_not_see_each_other(compiled):
    call, _ = compiled
    x, ids = inputs(), jnp.array(SEGMENTS)
    packed = call(x, ids)
    for row, start, stop in ((0, 0, 4), (0, 4, TOKENS), (1, 2, TOKENS)):
        alone = call(x[row : row + 1, start:stop])[0]
        np.testing.assert_allclose(packed[row, start:stop], alone, atol=1e-5 * np.abs(alone).max())


def test_more_tokens_than_a_cache_has_room_for(layer):
    cache = layer.init_cache(batch_size=BATCH, capacity=4)
    with pytest.raises(ValueError, match="11 tokens do not fit a cache of capacity 4"):
        layer.extend(inputs(), cache)
    with pytest.raises(ValueError, match="5 tokens do not fit a cache of capacity 4"):
        layer.extend(inputs(), cache, jnp.array([[1] * 4 + [0] * 7, [1] * 5 + [0] * 6]))
    padded = jnp.array([[1] * 4 + [0] * 7] * BATCH)  # padding needs no room
    jax.eval_shape(layer.extend, inputs(), cache, padded)


@pytest.mark.usefixtures("annotations_unchecked")
def test_what_does_not_fit_is_refused_in_words(layer):
    cache = layer.init_cache(batch_size=1, capacity=20)
    with pytest.raises(ValueError, match="cache is of 1 rows"):
        layer.extend(inputs(), cache)
    for x in (inputs()[:, :0], inputs()[:0], inputs()[..., :8], inputs()[0]):
        with pytest.raises(ValueError, match=r"x must be \[B, T, 16\]"):
            layer(x)
        with pytest.raises(ValueError, match=r"x must be \[B, T, 16\]"):
            layer.extend(x, cache)
    for capacity in (0, -1, 4.5):
        with pytest.raises(ValueError, match="capacity must be a whole number"):
            layer.init_cache(batch_size=1, capacity=capacity)
    with pytest.raises(ValueError, match="whole numbers, got float32"):
        layer(inputs(), segment_ids=jnp.full((BATCH, TOKENS), 0.5))


@pytest.mark.usefixtures("annotations_unchecked")
def test_a_cache_of_another_layer_is_refused(layer):
    other = MIXERS["attention" if isinstance(layer, MIXERS["rnn"]) else "rnn"]
    for foreign in (other(16, 4, rngs=nnx.Rngs(0)), type(layer)(32, 4, rngs=nnx.Rngs(0))):
        with pytest.raises(ValueError, match="of another layer: extend takes those of this layer's init_cache"):
            layer.extend(inputs(), foreign.init_cache(BATCH, TOKENS))


def test_a_kind_has_a_config_of_its_own(monkeypatch):
    monkeypatch.setitem(MIXERS, "another", type("Another", (MIXERS["local_attention"],), {}))
    with pytest.raises(ConfigError, match="local_attention, another share LocalAttentionConfig"):
        kind_of(MIXERS["another"].Config())
    with pytest.raises(ConfigError, match="is not the config of a mixer"):
        kind_of({"window": 3})


@pytest.mark.usefixtures("annotations_unchecked")
def test_segment_ids_of_another_shape(layer):
    with pytest.raises(ValueError, match=r"tokens' shape \(2, 11\), got \(2, 5\)"):
        layer(inputs(), segment_ids=jnp.ones((2, 5), jnp.int32))
    with pytest.raises(ValueError, match=r"tokens' shape \(2, 11\), got \(2, 5\)"):
        layer.extend(inputs(), layer.init_cache(BATCH, TOKENS), jnp.ones((2, 5), jnp.int32))


@pytest.mark.parametrize("kind", MIXERS)
def test_defaults_of_the_arguments_are_those_of_the_config(kind):
    arguments = inspect.signature(MIXERS[kind].__init__).parameters
    for field in dataclasses.fields(MIXERS[kind].Config):
        assert arguments[field.name].default == field.default, field.name


@pytest.mark.parametrize("kind", MIXERS)
def test_a_config_makes_the_layer_that_plain_arguments_make(kind):
    layer = new_layer(kind)
    again = MIXERS[kind].from_config(layer.config, layer.shape, rngs=nnx.Rngs(0))
    assert (again.config, again.shape) == (layer.config, layer.shape)
    assert nnx.graphdef(again) == nnx.graphdef(layer)
    for a, b in zip(jax.tree.leaves(nnx.state(again)), jax.tree.leaves(nnx.state(layer)), strict=True):
        np.testing.assert_array_equal(a, b)
    assert kind_of(layer.config) == kind


@pytest.mark.parametrize("kind", MIXERS)
def test_bfloat16(kind):
    layer = new_layer(kind, dtype=jnp.bfloat16)
    x = inputs().astype(jnp.bfloat16)
    assert jax.eval_shape(layer, x).dtype == jnp.bfloat16
    assert all(param.dtype == jnp.float32 for param in jax.tree.leaves(nnx.state(layer)))


@pytest.mark.parametrize("kind", MIXERS)
def test_facts_are_numbers(kind):
    layer = new_layer(kind)
    assert 0 <= layer.config.mean_keys(layer.shape, 64) <= 64 * layer.shape.head_dim
    memory = jax.eval_shape(lambda: layer.init_memory(BATCH, 32))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(memory))
    assert 0 < layer.step_bytes(memory, 8) <= layer.step_bytes(memory, 32) <= held


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("attention", {"num_heads": 3}, "width must be a multiple of num_heads, got width 16 and num_heads 3"),
        ("rat", {"num_groups": 3}, "num_groups must divide num_heads, got num_groups 3 and num_heads 4"),
        ("rat", {"chunk_size": 0}, "chunk_size must be 1 or more, got 0"),
        ("local_attention", {"window": -1}, "window must be 0 or more, got -1"),
        ("local_attention", {"num_kv_heads": 3}, "num_heads must be a multiple of num_kv_heads"),
        ("rattention", {"feature_map": "gelu"}, "feature_map must be one of"),
        ("rnn", {"max_timescale": 2}, "max_timescale must be 3 tokens or more, got 2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(kind, arguments, message):
    with pytest.raises(ConfigError, match=message):
        MIXERS[kind](**{"width": 16, "num_heads": 4, "rngs": nnx.Rngs(0)} | arguments)


def test_bytes_of_a_cache_are_those_of_its_arrays(layer):
    for sizes in ((1, 1), (3, TOKENS)):
        assert layer.cache_bytes(*sizes) == sum(x.nbytes for x in jax.tree.leaves(layer.init_cache(*sizes)))
    with pytest.raises(ValueError, match="capacity must be a whole number of 1 or more, got 0"):
        layer.cache_bytes(1, 0)
