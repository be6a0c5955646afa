"""Every shipped config builds, and has the parameters that the papers' models have."""

import importlib.util
import math
import pathlib

import jax
import pytest
from flax import nnx

from configs import default
from rat_jax.config import ConfigError, config_from_dict, config_to_dict
from rat_jax.model import LanguageModel

FILES = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))
MILLIONS = {
    "attention_1b": 1273.6,
    "rnn_1b": 1273.6,
    "rat_1b": 1298.8,
    "attention_swa_1b": 1273.6,
    "rat_swa_1b": 1286.2,
    "attention_3b": 2943.1,
    "attention_swa_3b": 2943.1,
    "rattention_3b": 2943.2,
    "rat_rattention_3b": 3046.0,
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_config_builds_abstractly(file):
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_from_dict(module.get_config())
    state = jax.eval_shape(lambda: nnx.state(LanguageModel(config.model, rngs=nnx.Rngs(0))))
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    if file.stem in MILLIONS:
        assert round(parameters / 1e6, 1) == MILLIONS[file.stem]


def test_round_trip():
    config = config_from_dict(default.get_config())
    assert config_from_dict(config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model.num_heads", 3, "config.model.width must be a multiple of num_heads, got width 128 and num_heads 3"),
        ("model.num_layers", 3, "config.model.num_layers must be a multiple of the length of pattern"),
        (
            "model.rat.num_groups",
            3,
            "config.model.rat.num_groups must divide num_heads, got num_groups 3 and num_heads",
        ),
        ("model.num_kv_heads", 3, "num_heads must be a multiple of num_kv_heads, got num_heads 4 and num_kv_heads 3"),
        ("model.mlp_kind", "relu", "config.model.mlp_kind must be one of 'gelu', 'geglu', 'swiglu'"),
        ("model.rattention.meta_tokens", -1, "config.model.rattention.meta_tokens must be 0 or more, got -1"),
        ("model.rat.chunk_size", 0, "config.model.rat.chunk_size must be 1 or more, got 0"),
        ("model.pattern", ("rat", "atention"), r"config.model.pattern\[1\] must be one of 'attention'"),
        ("model.dtype", "float16", "config.model.dtype must be one of 'float32', 'bfloat16'"),
        ("model.width", 128.5, "config.model.width must be of type int, got 128.5"),
        ("optimizer.learning_rate", float("nan"), "config.optimizer.learning_rate must be finite"),
        ("optimizer.accumulation_steps", 3, "data.global_batch_size must be a multiple of optimizer.accumulation_"),
        ("mesh.data", 0, "config.mesh.data must be 1 or more, or -1, got 0"),
    ],
)
def test_what_no_run_can_have_is_refused_by_name(field, value, message):
    values = default.get_config().to_dict()
    *groups, name = field.split(".")
    group = values
    for key in groups:
        group = group[key]
    group[name] = value
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


def test_unknown_and_missing_keys_are_named():
    values = default.get_config().to_dict()
    values["model"]["widht"] = 1
    with pytest.raises(ConfigError, match=r"config\.model\.widht is not a field of ModelConfig; did you mean 'width'"):
        config_from_dict(values)
    del values["model"]["widht"], values["data"]["path"]
    with pytest.raises(ConfigError, match=r"config\.data\.path is missing"):
        config_from_dict(values)
