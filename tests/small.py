"""Small models that several test files build."""

import dataclasses

from flax import nnx

from configs import default
from rat_jax.config import Config, ModelConfig, config_from_dict
from rat_jax.model import LanguageModel

PATTERNS = [("attention",), ("local_attention",), ("rnn",), ("rat",), ("rat", "local_attention")]


def small_config() -> Config:
    """`configs/default.py` with every size cut down; window and chunks are short enough to be crossed many times."""
    values = default.get_config()
    values.model.update(
        {"vocab_size": 31, "width": 16, "num_layers": 2, "num_heads": 4, "mlp_width": 32, "remat": "none"}
    )
    values.model.local_attention.window = 5
    values.model.rnn.max_timescale = 20
    values.model.rat.chunk_size = 4
    values.model.rattention.update({"window": 2, "meta_tokens": 3, "learned_scales": True})
    return config_from_dict(values)


def small_model_config(pattern: tuple[str, ...], **changes) -> ModelConfig:
    """The model of `small_config` with another pattern and other fields."""
    return dataclasses.replace(small_config().model, pattern=pattern, **changes)


def small_model(pattern: tuple[str, ...], seed: int = 0, **changes) -> LanguageModel:
    """A new model of `small_model_config`, with weights large enough that every part of it matters."""
    model = LanguageModel(small_model_config(pattern, **changes), rngs=nnx.Rngs(seed))
    for path, param in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("kernel", "embedding"):
            param[...] = param[...] * 15
        if path[-1] in ("meta_key", "meta_value"):
            param[...] = param[...] * 50
    return model
