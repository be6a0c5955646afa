"""Small models that several test files build."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from configs import default
from rat_jax.config import Config, ModelConfig, config_from_dict
from rat_jax.mixers import MIXERS
from rat_jax.model import LanguageModel

# Every kind of mixer alone, and the hybrid.
PATTERNS = [*((kind,) for kind in MIXERS), ("rat", "local_attention")]
# Every kind once, in pairs, which take less time than each kind alone.
PAIRS = [tuple(MIXERS)[start : start + 2] for start in range(0, len(MIXERS), 2)]

# Windows and chunks are short enough to be crossed many times.
SETTINGS = {
    "local_attention": {"window": 5},
    "rnn": {"max_timescale": 20},
    "rat": {"chunk_size": 4},
    "rattention": {"window": 2, "meta_tokens": 3, "learned_scales": True},
}


def small_config(pattern: tuple[str, ...] = ("rat", "local_attention")) -> Config:
    """`configs/default.py` with every size cut down."""
    values = default.get_config().to_dict()
    values["model"] |= {"vocab_size": 31, "width": 16, "num_layers": 2, "num_heads": 4, "mlp_width": 32}
    values["model"] |= {"remat": "none", "pattern": pattern}
    for kind, settings in SETTINGS.items():
        values["model"][kind] = values["model"].get(kind, {}) | settings
    return config_from_dict(values)


def small_model_config(pattern: tuple[str, ...], **changes) -> ModelConfig:
    """The model of `small_config` with another pattern and other fields."""
    return dataclasses.replace(small_config(pattern).model, **changes)


def with_random_scales(model: LanguageModel) -> LanguageModel:
    """The model, whose norms have scales of their own: new ones are all ones."""
    for number, (path, param) in enumerate(nnx.to_flat_state(nnx.state(model))):
        if path[-1] == "scale":
            param[...] = 1 + 0.3 * jax.random.normal(jax.random.key(number), param[...].shape)
    return model


def small_model(pattern: tuple[str, ...], seed: int = 0, **changes) -> LanguageModel:
    """A new model of `small_model_config`, with weights large enough that every part of it matters."""
    model = LanguageModel(small_model_config(pattern, **changes), rngs=nnx.Rngs(seed))
    for path, param in nnx.to_flat_state(nnx.state(model)):
        if path[-1] in ("kernel", "embedding"):
            param[...] = param[...] * 15
        if path[-1] in ("meta_key", "meta_value"):
            param[...] = param[...] * 50
    return model


def bigram_model(**changes) -> tuple[LanguageModel, np.ndarray]:
    """A model in which only the last token decides what is next, and log p(next | last) [V, V] in float64."""
    model = small_model(("rnn",), num_layers=1, **changes)
    for path, param in nnx.to_flat_state(nnx.state(model)):
        if path[-2:] in (("out_proj", "kernel"), ("down", "kernel")):
            param[...] = jnp.zeros_like(param[...])
    embedding = np.asarray(model.embedding[...], np.float64)
    scale = np.asarray(model.final_norm.scale[...], np.float64)
    hidden = embedding / np.sqrt(np.square(embedding).mean(axis=-1, keepdims=True) + 1e-6) * scale
    logits = hidden @ embedding.T
    return model, logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
