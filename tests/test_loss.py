"""The blocked next-token loss against the loss of all logits at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax import loss as loss_module
from rat_jax.loss import LossSums, next_token_loss, position_losses, token_scores

B, T, D, V = 3, 13, 8, 17


def inputs(dtype="float32"):
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(B, T, D)), dtype)
    embedding = jnp.asarray(rng.normal(size=(V, D)), jnp.float32)
    targets = jnp.asarray(rng.integers(0, V, size=(B, T)), jnp.int32)
    weights = jnp.asarray(rng.integers(0, 3, size=(B, T)), jnp.float32)
    return hidden, embedding, targets, weights


def dense(hidden, embedding, targets, weights):
    """The sum of the losses from all logits in float64."""
    logits = np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    gradient = np.exp(log_probs)
    losses = 0.0
    for b in range(B):
        for t in range(T):
            losses -= float(weights[b, t]) * log_probs[b, t, targets[b, t]]
            gradient[b, t, targets[b, t]] -= 1
    gradient *= np.asarray(weights, np.float64)[..., None]
    d_hidden = gradient @ np.asarray(embedding, np.float64)
    d_embedding = np.einsum("btv,btd->vd", gradient, np.asarray(hidden, np.float64))
    return losses, d_hidden, d_embedding


@pytest.fixture(params=[1, 4, T], ids=lambda tokens: f"blocks_of_{tokens}")
def block_tokens(request, monkeypatch):
    monkeypatch.setattr(loss_module, "_BLOCK_LOGITS", request.param * B * V)
    return request.param


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_value_and_gradients(block_tokens, dtype, tolerance):
    arrays = inputs(dtype)
    expected, d_hidden, d_embedding = dense(*arrays)

    @jax.jit
    def run(hidden, embedding):
        def half(hidden, embedding):
            return 0.5 * next_token_loss(hidden, embedding, *arrays[2:]).loss

        value, gradients = jax.value_and_grad(half, argnums=(0, 1))(hidden, embedding)
        return next_token_loss(hidden, embedding, *arrays[2:]).loss, value, gradients

    alone, value, gradients = run(*arrays[:2])
    np.testing.assert_allclose(value, 0.5 * expected, rtol=tolerance)
    np.testing.assert_allclose(alone, expected, rtol=tolerance)
    for gradient, reference in zip(gradients, (d_hidden, d_embedding), strict=True):
        np.testing.assert_allclose(
            np.asarray(gradient, np.float64), 0.5 * reference, atol=tolerance * np.abs(reference).max()
        )
    assert gradients[0].dtype == jnp.dtype(dtype)
    assert gradients[1].dtype == jnp.float32


def test_losses_by_position(block_tokens):
    hidden, embedding, targets, weights = inputs()
    expected = [dense(hidden, embedding, targets, weights * (np.arange(T) == t)[None])[0] for t in range(T)]
    losses = jax.jit(lambda *arrays: position_losses(*arrays))  # traced anew for each size of a block
    np.testing.assert_allclose(losses(hidden, embedding, targets, weights), expected, rtol=1e-5)


def test_scores_of_tokens(block_tokens):
    hidden, embedding, targets, _ = inputs()
    logits = np.asarray(hidden, np.float64) @ np.asarray(embedding, np.float64).T
    targets = jnp.where(jnp.arange(T)[None] % 2 == 0, targets, jnp.int32(logits.argmax(-1)))
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    scores = jax.jit(lambda *arrays: token_scores(*arrays))(hidden, embedding, targets)
    want = np.take_along_axis(log_probs, np.asarray(targets)[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(scores.log_probs, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(scores.greedy, logits.argmax(-1) == targets)
    assert 0 < np.mean(scores.greedy) < 1


def test_of_equal_logits_the_first_is_greedy():
    scores = token_scores(jnp.ones((1, 3, 2)), jnp.ones((4, 2)), jnp.asarray([[0, 1, 3]]))
    np.testing.assert_array_equal(scores.greedy, [[True, False, False]])
    np.testing.assert_allclose(scores.log_probs, np.full((1, 3), -np.log(4)), rtol=1e-6)


def test_weight_is_the_sum_of_weights():
    arrays = inputs()
    assert next_token_loss(*arrays).weight == arrays[3].sum()


def test_no_targets_make_no_loss_and_no_gradient():
    hidden, embedding, targets, weights = inputs()

    def mean(hidden, embedding):
        return next_token_loss(hidden, embedding, targets, jnp.zeros_like(weights)).mean()

    value, gradients = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))(hidden, embedding)
    assert value == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_extreme_logits_stay_finite():
    hidden, embedding, targets, weights = inputs()
    both = jax.jit(jax.value_and_grad(lambda h: next_token_loss(h, embedding, targets, weights).loss))
    value, gradient = both(1e4 * hidden)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(
    "function",
    [
        jax.grad(lambda *a: next_token_loss(*a).loss, argnums=(0, 1)),
        lambda hidden, embedding, targets, weights: token_scores(hidden, embedding, targets),
    ],
    ids=["gradients", "scores"],
)
def test_all_logits_are_never_in_memory(monkeypatch, function):
    monkeypatch.setattr(loss_module, "_BLOCK_LOGITS", 4 * 2000)
    shapes = [(4, 256, 4), (2000, 4), (4, 256), (4, 256)]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in zip(shapes, (jnp.float32, jnp.float32, jnp.int32, jnp.float32), strict=True)
    ]
    needs = jax.jit(function).lower(*arguments).compile().memory_analysis()
    assert needs.temp_size_in_bytes < 4 * 256 * 2000 * 4 / 8


def test_mean():
    assert LossSums(jnp.float32(6), jnp.float32(4)).mean() == 1.5
