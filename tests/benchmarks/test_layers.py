"""The layers that are timed: their decode steps do what their one pass does, and what is refused says why."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks.layers import (
    DTYPE,
    Sizes,
    apply_layer,
    decode,
    init_memory,
    make_layer,
    min_bytes,
    product_operations,
    step_bytes,
)
from rat_jax.mixers import MIXERS

SIZES = Sizes(width=32, heads=4, key_heads=2, settings={"chunk_size": 4, "window": 5, "num_groups": 2})


# The mixers' own steps are tested with them: quick are two whose memories lie in slots.
QUICK = ("rat", "rattention:window=2")


@pytest.mark.parametrize(
    "name",
    [
        *QUICK,
        *(pytest.param(name, marks=pytest.mark.slow) for name in [*MIXERS, "rat:implementation=xla"] if name != "rat"),
    ],
)
def test_steps_are_the_pass(name):
    graphdef, params = make_layer(name, SIZES)
    x = jax.random.normal(jax.random.key(0), (2, 11, SIZES.width), DTYPE)
    want = jax.jit(functools.partial(apply_layer, graphdef))(params, x)
    memory, out = init_memory(graphdef, params, 2, 12), []

    @jax.jit
    def step(params, x, memory, t):
        return nnx.merge(graphdef, params).step(x, t, memory)

    for t in range(x.shape[1]):
        mixed, memory = step(params, x[:, t : t + 1], memory, jnp.int32(t))
        out.append(mixed)
    got, want = (np.asarray(x, np.float32) for x in (jnp.concatenate(out, axis=1), want))
    np.testing.assert_allclose(got, want, atol=2e-2)


@pytest.mark.parametrize("name", MIXERS)
def test_a_decode_loop_runs_and_its_floors_are_counted(name):
    graphdef, params = make_layer(name, SIZES)
    x = jnp.ones((3, 1, SIZES.width), DTYPE)
    run = jax.jit(lambda *inputs: decode(graphdef, 4, *inputs))
    out, _ = run(params, x, init_memory(graphdef, params, 3, 16), jnp.int32(16))
    assert out.shape == x.shape and bool(jnp.isfinite(out).all())
    assert step_bytes(graphdef, params, 3, 16) >= step_bytes(graphdef, params, 3, 3) > 0
    assert all(count >= 0 for count in product_operations(graphdef, params, 2, 16))
    forward, both = min_bytes(graphdef, params, 16)
    assert 0 < forward < both


def test_steps_write_where_the_position_says():
    graphdef, params = make_layer("rat", SIZES)  # chunks of 4
    run = jax.jit(lambda *inputs: decode(graphdef, 4, *inputs))
    _, after = run(params, jnp.ones((3, 1, 32), DTYPE), init_memory(graphdef, params, 3, 16), jnp.int32(12))
    written = (after.summary_value != 0).any(axis=(2, 3))
    assert written.tolist() == [[False, False, True, False]] * 3


@pytest.mark.parametrize("name", ["other", "rat:other", "rat:implementation=other", "rnn:window=3"])
def test_unknown_layers_are_refused(name):
    with pytest.raises(ValueError, match=name.split(":")[-1]):
        make_layer(name, SIZES)
