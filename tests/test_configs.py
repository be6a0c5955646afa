"""Every shipped config builds, and has the parameters that the papers' models have."""

import dataclasses
import importlib.util
import json
import math
import operator
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from configs import default, mixture
from rat_jax.checkpoints.workdir import flatten
from rat_jax.config import Config, ConfigError, ModelConfig, config_from_dict, config_to_dict, with_absolute_paths
from rat_jax.config_file import load_config_file
from rat_jax.mixers import MIXERS, RatConfig
from rat_jax.model import LanguageModel
from rat_jax.paths import PathError
from tests.tiny_run import tiny_config

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
    "rat_swa_7b": 6641.0,
    "rattention_12b": 12747.5,
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


@pytest.mark.parametrize(
    ("argument", "pattern"),
    [
        ("niah.py:rat,384", ("rat",)),
        ("rattention_3b.py:rattention", ("rattention",)),
        ("rattention_3b.py:hybrid", ("attention", "rattention", "rattention", "rattention")),
        ("rattention_12b.py:rattention", ("rattention",)),
        ("rattention_12b.py:hybrid", ("attention", "rattention", "rattention", "rattention")),
    ],
)
def test_arguments_choose_the_layers(argument, pattern):
    config = config_from_dict(load_config_file(f"configs/{argument}", "--config"))
    assert config.model.pattern == pattern


@pytest.mark.parametrize("argument", ["niah.py:rat,2048", "rattention_3b.py:all", "rattention_12b.py:all"])
def test_arguments_that_choose_nothing(argument):
    with pytest.raises(ConfigError, match="is none of"):
        load_config_file(f"configs/{argument}", "--config")


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
        (
            "evaluation.length.every_steps",
            100,
            r"config\.evaluation\.length\.lengths must name at least one where every",
        ),
        ("evaluation.length.lengths", (64, 0), r"config\.evaluation\.length\.lengths must be 1 or more, got \(64, 0\)"),
        ("evaluation.length.batch_tokens", 0, r"config\.evaluation\.length\.batch_tokens must be 1 or more, got 0"),
        ("evaluation.on_failure", "ignore", r"config\.evaluation\.on_failure must be one of 'report', 'stop'"),
        ("model.rat.chunk_size", 0, "config.model.rat.chunk_size must be 1 or more, got 0"),
        ("model.pattern", ("rat", "atention"), r"config.model.pattern\[1\] must be one of 'attention'"),
        ("model.dtype", "float16", "config.model.dtype must be one of 'float32', 'bfloat16'"),
        ("model.width", 128.5, "config.model.width must be a whole number, got 128.5"),
        ("model.width", True, "config.model.width must be a whole number, got True"),
        ("model.width", 2**32, r"config.model.width must be below 2\*\*32, got 4294967296"),
        ("model.pattern", "rat", r"config.model.pattern must be of type tuple\[str, ...\], got 'rat'"),
        ("model.pattern", ("rat", 3), r"config.model.pattern\[1\] must be text, got 3"),
        ("training.wandb_project", 3, "config.training.wandb_project must be text or None, got 3"),
        ("optimizer.learning_rate", "1", "config.optimizer.learning_rate must be a finite number, got '1'"),
        ("optimizer.learning_rate", 2**40, r"config.optimizer.learning_rate must be below 2\*\*32, got 1099"),
        ("optimizer.learning_rate", float("nan"), "config.optimizer.learning_rate must be a finite number, got nan"),
        ("optimizer.accumulation_steps", 3, "data.global_batch_size must be a multiple of optimizer.accumulation_"),
        ("data.first_target_id", 2048, "config.data.first_target_id must be below model.vocab_size 2048, or no target"),
        ("training.on_spike", "stop", "config.training.on_spike must be one of 'ignore', 'report', 'skip'"),
        ("init.step", 3, "config.init.step is of what path names, and path is None"),
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": "data/x"}, r"config\.data\.path is 'data/x' and corpora name code, pages: give one of the two"),
        ({"corpora": {}}, r"config\.data\.path is missing: it must be a path, or corpora name several"),
        ({"corpora": {"code": {"path": "x"}}}, r"config\.data\.corpora\.code\.weight is missing"),
        ({"corpora": {"code": {"path": "x", "weight": 0}}}, r"data\.corpora\.code\.weight must be above 0, got 0"),
        ({"corpora": {"code": {"path": 3, "weight": 1}}}, r"config\.data\.corpora\.code\.path must be text, got 3"),
        ({"corpora": {"code": "x"}}, r"config\.data\.corpora\.code must be a group of fields, got 'x'"),
        ({"corpora": {"": {"path": "x", "weight": 1}}}, r"config\.data\.corpora: '' is no name of letters, digits"),
        ({"corpora": {"a/b": {"path": "x", "weight": 1}}}, r"config\.data\.corpora: 'a/b' is no name of letters"),
        ({"corpora": "x"}, r"config\.data\.corpora must be of type .*CorpusConfig\], got 'x'"),
    ],
)
def test_corpora_that_are_none_are_named(changes, message):
    values = mixture.get_config().to_dict()
    values["data"] |= changes
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


def test_corpora_are_saved_and_read_in_the_order_of_their_names():
    values = mixture.get_config().to_dict()
    config = config_from_dict(values)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    values["data"]["corpora"] = dict(reversed(values["data"]["corpora"].items()))
    assert list(config_from_dict(values).data.corpora) == ["code", "pages"]
    assert [part.path for part in config.data.parts.values()] == [
        corpus.path for corpus in config.data.corpora.values()
    ]


def test_paths_of_a_config_mean_the_same_everywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = with_absolute_paths(tiny_config("data/mine"))
    assert config.data.path == str(tmp_path / "data/mine")
    assert with_absolute_paths(config) == config
    with pytest.raises(PathError, match=r"config\.data\.path is 'gs://bucket/data': gs:// is not read directly: mount"):
        with_absolute_paths(tiny_config("gs://bucket/data"))


def test_the_defaults_of_the_project_are_those_of_the_dataclasses():
    """`configs/default.py` says a reason for every other value, and for no value that is none."""
    config, differing = config_from_dict(default.get_config()), set()
    for name, default_value in FIELDS.items():
        if default_value is not dataclasses.MISSING and operator.attrgetter(name)(config) != default_value:
            differing.add(name)
    values = default.get_config().to_dict()["model"]
    for kind, mixer in MIXERS.items():
        defaults = dataclasses.asdict(mixer.Config())
        assert values[kind].keys() == defaults.keys()
        differing |= {f"model.{kind}.{name}" for name in defaults if values[kind][name] != defaults[name]}
    assert differing == set(default.DEVIATIONS)


def test_a_flag_can_change_every_field_but_corpora():
    """Flags change what a config file sets, and every shipped one begins with the default's fields."""
    missing = FIELDS.keys() - flatten(default.get_config().to_dict(), "").keys()
    assert missing == {"data.corpora"}


def test_a_config_file_may_hold_every_kind_and_the_config_what_its_pattern_names():
    values = default.get_config().to_dict()
    values["model"]["pattern"] = ("rat",)
    config = config_from_dict(values)
    assert set(config.model.mixers) == {"rat"}
    assert not (set(config_to_dict(config)["model"]) & set(MIXERS)) - {"rat"}
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_two_settings_of_one_kind():
    values = default.get_config().to_dict()
    values["model"] |= {"pattern": ("local_attention", "wide"), "wide": {"kind": "local_attention", "window": 64}}
    config = config_from_dict(values)
    assert [config.model.mixers[name].window for name in config.model.pattern] == [32, 64]
    assert config.model.kinds == ("local_attention", "local_attention")
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config
    model = nnx.eval_shape(lambda: LanguageModel(config.model, rngs=nnx.Rngs(0)))
    assert [model.blocks[f"{i:02d}_local_attention"].mixer.config.window for i in range(2)] == [32, 64]
    with pytest.raises(ConfigError, match=r"pattern\[1\] must be one of .*; got 'wide'"):
        dataclasses.replace(config.model, mixers={})


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"window": 64}, r"config\.model\.wide is a group without a kind"),
        ({"kind": ["rat"]}, r"config\.model\.wide\.kind must be one of 'attention', 'local_attention'"),
        ({"kind": "local", "window": 64}, r"config\.model\.wide\.kind must be one of 'attention', 'local_attention'"),
        (
            {"kind": "local_attention", "windw": 64},
            r"config\.model\.wide\.windw is not a field of LocalAttentionConfig",
        ),
        ({"kind": "local_attention", "window": -1}, r"config\.model\.wide\.window must be 0 or more, got -1"),
    ],
)
def test_settings_that_are_none_are_named(group, message):
    values = default.get_config().to_dict()
    values["model"] |= {"pattern": ("local_attention", "wide"), "wide": group}
    with pytest.raises(ConfigError, match=message):
        config_from_dict(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixers": {"rat": {"chunk_size": 8}}}, "{'chunk_size': 8} is not the config of a mixer"),
        ({"mixers": None}, "mixers must be of type .*Mapping.*, got None"),
        ({"remat": "foo"}, "remat must be one of 'none', 'block', 'dots', got 'foo'"),
        ({"mlp_kind": "foo"}, "mlp_kind must be one of .*, got 'foo'"),
        ({"dtype": "float16"}, "dtype must be one of 'float32', 'bfloat16', got 'float16'"),
        ({"width": 8.0}, "width must be a whole number, got 8.0"),
        ({"pattern": ("width",), "mixers": {"width": RatConfig()}}, r"mixers\['width'\] has the name of a field"),
        ({"pattern": ("dtype",), "mixers": {"dtype": RatConfig()}}, r"mixers\['dtype'\] has the name of a field"),
    ],
)
def test_types_are_checked_in_python_too(changes, message):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**{"vocab_size": 11, "width": 8, "num_layers": 2, "num_heads": 2, "pattern": ("rat",)} | changes)


@pytest.mark.parametrize("setting", [{"chunk_size": "4"}, {"chunk_size": True}, {"rope_base": float("nan")}])
def test_types_of_settings_are_checked(setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} must be a"):
        RatConfig(**setting)


def test_a_model_in_python_alone():
    config = ModelConfig(vocab_size=11, width=8, num_layers=2, num_heads=2, pattern=("rat", "local_attention"))
    model = LanguageModel(config, rngs=nnx.Rngs(0))
    decoder, tokens = model.decoder(), jnp.arange(10)[None]
    cache, logits = decoder.init_cache(batch_size=1, capacity=16), []
    for t in range(10):
        step, cache = decoder.extend(tokens[:, t : t + 1], cache)
        logits.append(step)
    np.testing.assert_allclose(jnp.concatenate(logits, axis=1), model(tokens), atol=1e-5)
    with pytest.raises(ValueError, match="17 tokens do not fit a cache of capacity 16"):
        decoder.extend(jnp.ones((1, 17), jnp.int32), decoder.init_cache(1, 16))
    with pytest.raises(ValueError, match="17 tokens do not fit a cache of capacity 16"):
        decoder.extend(jnp.ones((1, 17), jnp.int32), decoder.init_cache(1, 16), jnp.ones((1, 17), jnp.int32))
    with pytest.raises(ValueError, match="the cache is of 2 rows"):
        decoder.extend(tokens, decoder.init_cache(2, 16))
    with pytest.raises(ValueError, match="capacity must be a whole number of 1 or more, got 0"):
        model.init_cache(1, 0)


def field_defaults(cls, prefix=""):
    """The default of every field of a dataclass and of the groups in it; a model's mixers have fields of their own."""
    found, hints = {}, typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            found |= field_defaults(hints[field.name], f"{prefix}{field.name}.")
        elif (cls, field.name) != (ModelConfig, "mixers"):
            has_factory = field.default_factory is not dataclasses.MISSING
            found[f"{prefix}{field.name}"] = field.default_factory() if has_factory else field.default
    return found


FIELDS = field_defaults(Config)

# Options that no shipped config sets to another value than the default, and the file that tests other values.
OPTIONS = {
    "data.segment_documents": "tests/data/test_pipeline.py",
    "evaluation.answers.batch_tokens": "tests/training/test_evaluators.py",
    "evaluation.answers.context_length": "tests/training/test_evaluators.py",
    "evaluation.answers.every_steps": "tests/training/test_evaluators.py",
    "evaluation.answers.file": "tests/training/test_evaluators.py",
    "evaluation.answers.limit": "tests/training/test_evaluators.py",
    "evaluation.answers.max_new_tokens": "tests/training/test_evaluators.py",
    "evaluation.length.batch_tokens": "tests/training/test_evaluations.py",
    "evaluation.length.max_batches": "tests/training/test_evaluations.py",
    "evaluation.on_failure": "tests/training/test_evaluations.py",
    "evaluation.ruler.answer_tokens": "tests/training/test_evaluators.py",
    "evaluation.ruler.batch_tokens": "tests/training/test_evaluators.py",
    "evaluation.ruler.context_lengths": "tests/training/test_evaluators.py",
    "evaluation.ruler.essay": "tests/training/test_evaluators.py",
    "evaluation.ruler.every_steps": "tests/training/test_evaluators.py",
    "evaluation.ruler.num_examples": "tests/training/test_evaluators.py",
    "evaluation.ruler.seed": "tests/training/test_evaluators.py",
    "evaluation.ruler.tasks": "tests/training/test_evaluators.py",
    "evaluation.ruler.templates": "tests/training/test_evaluators.py",
    "evaluation.tasks.batch_tokens": "tests/training/test_evaluators.py",
    "evaluation.tasks.every_steps": "tests/training/test_evaluators.py",
    "evaluation.tasks.folder": "tests/training/test_evaluators.py",
    "evaluation.tasks.limit": "tests/training/test_evaluators.py",
    "evaluation.tasks.names": "tests/training/test_evaluators.py",
    "init.optimizer": "tests/training/test_origin.py",
    "init.step": "tests/training/test_origin.py",
    "mesh.context": "tests/test_sharding.py",
    "mesh.data": "tests/test_sharding.py",
    "mesh.fsdp": "tests/test_sharding.py",
    "mesh.tensor": "tests/test_sharding.py",
    "model.gated_deltanet.conv_size": "tests/mixers/test_gated_deltanet.py",
    "model.gated_deltanet.expand_v": "tests/mixers/test_gated_deltanet.py",
    "model.rat.num_groups": "tests/test_twin.py",
    "model.rat.rope_base": "tests/ops/test_rat.py",
    "model.rattention.feature_map": "tests/mixers/test_rattention.py",
    "model.rattention.meta_tokens": "tests/mixers/test_rattention.py",
    "model.rattention.rope_base": "tests/mixers/test_rattention.py",
    "optimizer.beta1": "tests/training/test_optimizer.py",
    "optimizer.beta2": "tests/training/test_optimizer.py",
    "optimizer.clip_norm": "tests/training/test_optimizer.py",
    "optimizer.epsilon": "tests/training/test_optimizer.py",
    "optimizer.warmup_fraction": "tests/training/test_optimizer.py",
    "seed": "tests/training/test_origin.py",
    "training.checkpoint_every_minutes": "tests/training/test_loop.py",
    "training.checkpoints_to_keep": "tests/checkpoints/test_store.py",
    "training.max_skips_in_a_row": "tests/training/test_guards.py",
    "training.on_non_finite": "tests/training/test_guards.py",
    "training.on_spike": "tests/training/test_guards.py",
    "training.profile_num_steps": "tests/training/test_profile.py",
    "training.profile_step": "tests/training/test_profile.py",
    "training.spike_factor": "tests/training/test_guards.py",
    "training.spike_window_steps": "tests/training/test_guards.py",
    "training.wandb_project": "tests/training/test_run.py",
}


def test_every_field_is_set_by_a_config_or_is_an_option_with_a_test():
    """A field that nothing sets and nothing tests has no business in a config."""
    everything, used = set(), set()
    for file in FILES:
        values = importlib.import_module(f"configs.{file.stem}").get_config().to_dict()
        config = config_from_dict(values)
        found = {name: (default, operator.attrgetter(name)(config)) for name, default in FIELDS.items()}
        for kind, mixer in MIXERS.items():
            for field in dataclasses.fields(mixer.Config):
                found[f"model.{kind}.{field.name}"] = (field.default, values["model"][kind][field.name])
        everything |= found.keys()
        used |= {name for name, (default, value) in found.items() if default is dataclasses.MISSING or value != default}
    assert everything - used == set(OPTIONS)
    for name, file in OPTIONS.items():
        assert name.split(".")[-1] in (FILES[0].parents[1] / file).read_text(), f"{file} does not test {name}"
