"""Softmax attention: blocks, windows, groups, and rows that see nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.layout import from_segments, whole_rows
from rat_jax.ops.attention import Place, attention
from tests import reference


def inputs(tokens=37, heads=4, key_heads=4, head_dim=8):
    keys = jax.random.split(jax.random.key(tokens), 3)
    counts = (heads, key_heads, key_heads)
    return tuple(jax.random.normal(key, (2, tokens, n, head_dim)) for key, n in zip(keys, counts, strict=True))


def place_of(layout):
    return Place(layout.segment_ids, layout.order)


def attend(query, key, value, layout=None, **options):
    place = place_of(whole_rows(*query.shape[:2]) if layout is None else layout)
    return attention(query, key, value, query_place=place, key_place=place, **options)


@pytest.fixture(params=[False, True], ids=["at-once", "in-blocks"])
def blocks(request, monkeypatch):
    if request.param:
        monkeypatch.setattr("rat_jax.ops.attention._MAX_SCORES", 1)
        monkeypatch.setattr("rat_jax.ops.attention._MIN_BLOCK", 8)


@pytest.mark.parametrize("window", [None, 0, 5, 12, 100])
@pytest.mark.parametrize("aligned", [False, True])
def test_equals_the_loop(window, aligned, blocks):
    query, key, value = inputs()
    out = attend(query, key, value, window=window, aligned=aligned).out
    np.testing.assert_allclose(out, reference.attention(query, key, value, window=window), atol=2e-6)


def test_neighbouring_query_heads_share_a_key_head(blocks):
    query, key, value = inputs(heads=6, key_heads=2)
    expected = attend(query, jnp.repeat(key, 3, axis=2), jnp.repeat(value, 3, axis=2)).out
    np.testing.assert_allclose(attend(query, key, value).out, expected, atol=1e-6)
    with pytest.raises(ValueError, match="query heads must be a multiple of key heads, got 5 and 2"):
        attend(query[:, :, :5], key, value)


def test_log_sum_exp(blocks):
    query, key, value = inputs(tokens=9)
    found = attend(query, key, value).log_sum_exp
    scores = jnp.einsum("btnh,bsnh->btns", query, key) / np.sqrt(8)
    causal = jnp.tril(jnp.ones((9, 9), bool))[None, :, None]
    np.testing.assert_allclose(found, jax.nn.logsumexp(jnp.where(causal, scores, -jnp.inf), axis=-1), atol=1e-5)


def test_padding_reads_nothing_and_has_no_gradient(blocks):
    query, key, value = inputs()
    segments = jnp.array([[0] * 5 + [1] * 20 + [0] * 12, [0] * 37])
    layout = from_segments(segments)[0]

    def loss(arguments):
        attended = attend(*arguments, layout)
        return jnp.sum(attended.out**2) + 1e-9 * jnp.sum(attended.log_sum_exp)

    assert not np.any(attend(query, key, value, layout).out[segments == 0])
    for gradient in jax.grad(loss)((query, key, value)):
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient[segments == 0], 0.0)
