"""Parity with the PyTorch release: every value that it recorded (tests/testdata/README.md), float32 on the CPU.

The measured deviations stand in the test output: `pytest tests/release/test_weights.py -rP`.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rat_jax.config import ConfigError, MeshConfig, OptimizerConfig
from rat_jax.data.pipeline import Batch
from rat_jax.loss import next_token_loss
from rat_jax.release.model_config import release_model_config
from rat_jax.release.weights import ReleaseError, model_config_from_release, model_from_release, release_state_dict
from rat_jax.sharding import make_mesh
from rat_jax.training.optimizer import make_optimizer
from rat_jax.training.step import TrainState, train_step

FOLDER = pathlib.Path(__file__).parents[1] / "testdata"
MODELS = ("attention", "rnn", "rat", "attention_swa", "rat_swa")
IGNORED = -100
# Compiles three times faster. The training run below is compiled as every run is.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


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


# The layers of rat are those of rat_swa.
MARKED = [pytest.param(name, marks=[pytest.mark.slow] * (name == "rat")) for name in MODELS]


@pytest.mark.parametrize("name", MARKED)
def test_logits(name):
    arrays, model_config, state_dict = recording(name)
    logits = jit(model_from_release(state_dict, model_config))(arrays["input_ids"])
    assert logits.dtype == jnp.float32
    assert deviation(name, "logits", logits, arrays["logits"]) < 1e-4


@pytest.mark.parametrize("name", MARKED)
def test_logits_token_by_token(name):
    arrays, model_config, state_dict = recording(name)
    graphdef, params = nnx.split(model_from_release(state_dict, model_config))
    tokens = jnp.asarray(arrays["input_ids"])

    @jit
    def read(params, tokens):
        model = nnx.merge(graphdef, params)

        def step(cache, token):
            logits, cache = model.extend(token[:, None], cache)
            return cache, logits[:, 0]

        return jax.lax.scan(step, model.init_cache(*tokens.shape), tokens.T)[1].swapaxes(0, 1)

    assert deviation(name, "step logits", read(params, tokens), arrays["step_logits"]) < 1e-4


@pytest.mark.parametrize("name", MARKED)
def test_loss_and_every_gradient(name):
    arrays, model_config, state_dict = recording(name)
    graphdef, params = nnx.split(model_from_release(state_dict, model_config))
    targets, weights = targets_and_weights(arrays["labels"])
    tokens = jnp.asarray(arrays["input_ids"])

    @jit
    @jax.value_and_grad
    def loss_and_gradients(params):
        model = nnx.merge(graphdef, params)
        sums = next_token_loss(model.hidden(tokens), model.embedding[...], targets, weights)
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


# One is enough where time counts: what a step does with gradients is the same for all.
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name != "rat_swa")) for name in MODELS],
)
def test_training_run(name):
    """20 steps of the recorded recipe through the project's own train step, each from the one before.

    Final parameters: Adam divides a gradient by its own size, so that where a gradient is all rounding error a step
    may go either way by up to the learning rate, 8e-4. 1e-4 is far below that, and far above float32's rounding.
    """
    arrays, model_config, state_dict = recording(name)
    optimizer = OptimizerConfig(
        learning_rate=8e-4,
        min_learning_rate=1e-6,
        warmup_fraction=0.05,
        beta1=0.9,
        beta2=0.95,
        epsilon=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
        accumulation_steps=1,
    )
    num_steps = len(arrays["train_loss"])
    graphdef, params = nnx.split(model_from_release(state_dict, model_config))
    metrics = []
    with jax.set_mesh(make_mesh(MeshConfig(data=1, fsdp=1))):
        state = TrainState(jnp.int32(0), params, make_optimizer(optimizer, num_steps).init(params))
        for tokens, labels in zip(arrays["train_input_ids"], arrays["train_labels"], strict=True):
            batch = Batch(jnp.asarray(tokens), *targets_and_weights(labels), None)
            state, step_metrics = train_step(graphdef, optimizer, num_steps, state, batch)
            metrics.append(jax.device_get(step_metrics))

    metrics = jax.tree.map(lambda *values: np.stack(values).astype(np.float64), *metrics)
    assert deviation(name, "learning rate", metrics.learning_rate, arrays["train_lr"]) < 1e-9
    assert deviation(name, "gradient norm", metrics.grad_norm / arrays["train_grad_norm"], np.ones(num_steps)) < 1e-4
    assert deviation(name, "loss of a step", metrics.loss, arrays["train_loss"]) < 2e-4
    final = release_state_dict(nnx.merge(graphdef, state.params))
    for key, want in {**part(arrays, "param/"), **part(arrays, "trained/")}.items():
        assert deviation(name, f"final {key}", final[key], want) < 1e-4, key


@pytest.mark.parametrize("name", MODELS)
def test_configuration_there_and_back(name):
    _, model_config, _ = recording(name)
    config = model_config_from_release(model_config)
    assert release_model_config(config, seq_len=64) == model_config
    assert (
        config.pattern
        == {
            "attention": ("attention",),
            "rnn": ("rnn",),
            "rat": ("rat",),
            "attention_swa": ("attention", "local_attention"),
            "rat_swa": ("rat", "local_attention"),
        }[name]
    )
    if name == "rnn":
        assert config.mixers["rnn"].max_timescale == 64
    else:
        assert config.num_heads == 4
    if "swa" in name:
        assert config.mixers["local_attention"].window == 15
    if "rat" in name:
        rat = config.mixers["rat"]
        assert (rat.chunk_size, rat.num_groups) == (8, 2)


@pytest.mark.parametrize("name", ["attention", "rat_swa"])
def test_configuration_without_positions(name):
    model_config = changed(recording(name)[1], "embedding.pe", {"_name_": "empty"})
    config = model_config_from_release(model_config, "bfloat16")
    assert not any(mixer.rope for mixer in config.mixers.values())
    assert config.dtype == "bfloat16"
    assert release_model_config(config, seq_len=64) == model_config


def changed(values, path, value):
    """A copy of a nested dict with one entry set; removed if the value is None."""
    key, _, rest = path.partition(".")
    values = dict(values)
    if rest:
        values[key] = changed(values[key], rest, value)
    elif value is None:
        del values[key]
    else:
        values[key] = value
    return values


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("backbone._name_", "sequence_parallel"),
        ("backbone.bias", True),
        ("backbone.ln", "layernorm"),
        ("backbone.d_model", None),
        ("backbone.interleave_step", 3),
        ("backbone.seq_cell", 5),
        ("backbone.seq_cell1._name_", "mamba"),
        ("backbone.seq_cell1.chunk_size", 0),
        ("backbone.seq_cell1.k_channel", 4),
        ("backbone.seq_cell1.d_head", 16),
        ("backbone.seq_cell1.dilation", 2),
        ("backbone.seq_cell.bias", True),
        ("backbone.hidden_cell.act_fn", "silu"),
        ("backbone.hidden_cell.d_ffn", "128"),
        ("embedding.pe._name_", "interrope"),
        ("embedding.pe._name_", "alibi"),
        ("embedding.pe.dim", 4),
        ("embedding.pe.chunk_size", 16),
        ("embedding.pe.base", "10000"),
        ("embedding._name_", "image"),
        ("head.vocab_size", 62),
        ("head", None),
    ],
)
def test_configuration_that_is_refused_by_name(path, value):
    with pytest.raises(ConfigError) as error:
        model_config_from_release(changed(recording("rat_swa")[1], path, value))
    assert f"model.{path.removesuffix('.d_head')}" in str(error.value)


def test_cells_of_one_kind_may_have_two_settings():
    local = recording("rat_swa")[1]["backbone"]["seq_cell"]
    model_config = changed(recording("rat_swa")[1], "backbone.seq_cell1", local | {"window_size": 7})
    model_config = changed(model_config, "embedding.pe", {"_name_": "empty"})
    config = model_config_from_release(model_config)
    assert [config.mixers[name].window for name in config.pattern] == [7, 15]
    assert release_model_config(config, seq_len=64) == model_config


def test_models_that_the_release_does_not_have_are_not_exported():
    config = model_config_from_release(recording("rat_swa")[1])
    with pytest.raises(ReleaseError, match=r"model\.pattern"):
        release_model_config(dataclasses.replace(config, num_layers=3, pattern=("rat", "rat", "attention")), 64)
    without = dict(config.mixers) | {"rat": dataclasses.replace(config.mixers["rat"], rope=False)}
    with pytest.raises(ReleaseError, match="rope"):
        release_model_config(dataclasses.replace(config, mixers=without), 64)
    for option, value in (("num_kv_heads", 1), ("qk_norm", True), ("mlp_kind", "swiglu")):
        with pytest.raises(ReleaseError, match=f"the release has no models with model.{option}"):
            release_model_config(dataclasses.replace(config, **{option: value}), 64)


def test_every_name_that_does_not_fit_is_listed():
    _, model_config, state_dict = recording("rat_swa")
    state_dict = dict(state_dict)
    del state_dict["backbone.ln.weight"], state_dict["backbone.layers.0.seq_layer.gate_bias"]
    state_dict["backbone.layers.1.seq_layer.gate_bias"] = np.zeros(32, np.float32)
    state_dict["backbone.layers.1.hidden_layer.fc1.weight"] = np.zeros((32, 128), np.float32)
    state_dict["_orig_mod.embedding.wte.weight"] = state_dict["embedding.wte.weight"]
    with pytest.raises(ReleaseError) as error:
        model_from_release(state_dict, model_config)
    problems = [
        "embedding.wte.weight: there twice, with and without '_orig_mod.'",
        "backbone.layers.0.seq_layer.gate_bias: missing, of shape (32,)",
        "backbone.layers.1.hidden_layer.fc1.weight: has shape (32, 128), not (128, 32)",
        "backbone.ln.weight: missing, of shape (32,)",
        "backbone.layers.1.seq_layer.gate_bias: not a parameter of this model",
    ]
    assert str(error.value) == f"the weights are not those of the configuration: {'; '.join(problems)}"


def test_head_that_is_not_tied_is_refused():
    _, model_config, state_dict = recording("rnn")
    with pytest.raises(ReleaseError, match=r"head\.lm_head\.weight differs"):
        model_from_release(state_dict | {"head.lm_head.weight": state_dict["head.lm_head.weight"] + 1}, model_config)


def test_compiled_names_anywhere():
    _, model_config, state_dict = recording("rat")
    compiled = {
        "_orig_mod." + name.replace("seq_layer.", "seq_layer._orig_mod."): array for name, array in state_dict.items()
    }
    returned = release_state_dict(model_from_release(compiled, model_config))
    assert all(np.array_equal(returned[name], state_dict[name]) for name in state_dict)


def test_bfloat16_computation_over_float32_parameters():
    arrays, model_config, state_dict = recording("rat_swa")
    model = model_from_release(state_dict, model_config, dtype=jnp.bfloat16)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(model)))
    logits = jit(model)(arrays["input_ids"])
    assert 1e-4 < np.abs(logits - arrays["logits"]).max() < 0.2
