"""Parity with the PyTorch release: every value that it recorded (tests/testdata/README.md), float32 on the CPU.

The measured deviations stand in the test output: `pytest tests/test_release.py -rP`.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.loss import next_token_loss
from rat_jax.release import model_from_release, release_state_dict

FOLDER = pathlib.Path(__file__).parent / "testdata"
MODELS = ("attention", "rnn", "rat", "attention_swa", "rat_swa")
IGNORED = -100


@functools.cache
def recording(name):
    """The recorded arrays, the `model` configuration and the initial parameters of one of the models."""
    with np.load(FOLDER / f"{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    with np.load(FOLDER / "initial.npz") as file:
        state_dict = {key.removeprefix(f"{name}/"): file[key] for key in file.files if key.startswith(f"{name}/")}
    state_dict["head.lm_head.weight"] = state_dict["embedding.wte.weight"]
    return arrays, json.loads(str(arrays["config"]))["model"], state_dict


def part(arrays, prefix):
    return {key.removeprefix(prefix): value for key, value in arrays.items() if key.startswith(prefix)}


def deviation(name, what, got, want, relative=False):
    """The largest difference, by itself or relative to the largest entry; printed for the table."""
    difference = float(np.abs(np.asarray(got) - want).max() / (np.abs(want).max() if relative else 1))
    print(f"{name:14} {what:45} {difference:.1e}")
    return difference


def targets_and_weights(labels):
    return jnp.maximum(labels, 0), jnp.asarray(labels != IGNORED, jnp.float32)


@pytest.mark.parametrize("name", MODELS)
def test_logits(name):
    arrays, model_config, state_dict = recording(name)
    logits = jax.jit(model_from_release(state_dict, model_config))(arrays["input_ids"])
    assert logits.dtype == jnp.float32
    assert deviation(name, "logits", logits, arrays["logits"]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_logits_token_by_token(name):
    arrays, model_config, state_dict = recording(name)
    graphdef, params = nnx.split(model_from_release(state_dict, model_config))
    tokens = jnp.asarray(arrays["input_ids"])

    @jax.jit
    def read(params, tokens):
        model = nnx.merge(graphdef, params)

        def step(cache, token):
            logits, cache = model.extend(token[:, None], cache)
            return cache, logits[:, 0]

        return jax.lax.scan(step, model.init_cache(*tokens.shape), tokens.T)[1].swapaxes(0, 1)

    assert deviation(name, "step logits", read(params, tokens), arrays["step_logits"]) < 1e-4


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_every_gradient(name):
    arrays, model_config, state_dict = recording(name)
    graphdef, params = nnx.split(model_from_release(state_dict, model_config))
    targets, weights = targets_and_weights(arrays["labels"])

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradients(params):
        model = nnx.merge(graphdef, params)
        sums = next_token_loss(model.hidden(arrays["input_ids"]), model.embedding[...], targets, weights)
        return sums.loss / sums.weight

    loss, gradients = loss_and_gradients(params)
    gradients = release_state_dict(nnx.merge(graphdef, gradients))
    assert deviation(name, "loss", loss, arrays["loss"]) < 1e-5
    recorded = part(arrays, "grad/")
    assert set(gradients) == {*recorded, "head.lm_head.weight"}
    for key, want in recorded.items():
        assert deviation(name, f"gradient of {key}", gradients[key], want, relative=True) < 1e-4, key


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_of_parameters_is_exact(name):
    _, model_config, state_dict = recording(name)
    returned = release_state_dict(model_from_release(state_dict, model_config))
    assert set(returned) == set(state_dict)
    for key, array in returned.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, state_dict[key], err_msg=key)
