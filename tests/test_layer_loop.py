"""Layers run in a loop, in passes of several and without a loop: the same values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rat_jax.layer_loop import run_layers

LAYERS = 5


def run(carry, layer, keep):
    return jnp.tanh(carry @ layer["kernel"] + layer["bias"][None]) * keep


def loss(stacks, x, unroll):
    keep = (x > -0.5).astype(jnp.int32)  # of the program's arguments: a layer reads what is being traced
    return jnp.sum(run_layers(run, x, stacks, keep, unroll) ** 2)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    stacks = {"kernel": rng.normal(size=(LAYERS, 3, 3)), "bias": rng.normal(size=(LAYERS, 3))}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), (stacks, rng.normal(size=(2, 3))))


@pytest.mark.parametrize("unroll", [1, 2, 4, LAYERS, LAYERS + 1])
def test_values_and_gradients_are_those_of_layers_in_turn(arrays, unroll):
    def in_turn(stacks, x):
        keep = (x > -0.5).astype(jnp.int32)
        for index in range(LAYERS):
            x = run(x, jax.tree.map(lambda stack, index=index: stack[index], stacks), keep)
        return jnp.sum(x**2)

    # A program inside the one that is differentiated, as a validation loss is.
    inner = jax.jit(loss, static_argnums=2)
    got = jax.jit(jax.value_and_grad(lambda stacks, x: inner(stacks, x, unroll), (0, 1)))(*arrays)
    wanted = jax.jit(jax.value_and_grad(in_turn, (0, 1)))(*arrays)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)


def test_without_a_loop_gradients_are_put_into_their_stacks_layer_by_layer(arrays):
    # A loop's gradients of all layers would be one array made of as many.
    stacks, x = arrays
    text = str(jax.make_jaxpr(jax.grad(lambda stacks: loss(stacks, x, LAYERS)))(stacks))
    assert "dynamic_update_slice" in text
    assert text.count("optimization_barrier") == LAYERS
    assert "scan" not in text and "concatenate" not in text


def test_a_layer_that_is_computed_again_gives_the_same_gradients(arrays):
    stacks, x = arrays
    again = jax.checkpoint(run)
    got = jax.grad(lambda stacks: jnp.sum(run_layers(again, x, stacks, jnp.int32(1), LAYERS) ** 2))(stacks)
    wanted = jax.grad(lambda stacks: jnp.sum(run_layers(run, x, stacks, jnp.int32(1), 1) ** 2))(stacks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, wanted)
