"""Weights of the PyTorch release of RAT (arXiv 2507.04416), read and written by their names there."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rat_jax.checkpoints.store import abstract_model
from rat_jax.config import ModelConfig
from rat_jax.mixers import MIXERS
from rat_jax.model import LanguageModel, block_name
from rat_jax.release.model_config import ReleaseError, model_config_from_release

_COMPILE_PREFIX = "_orig_mod."  # which torch.compile puts before the names of what it wraps
_MAX_PROBLEMS = 8  # that a message lists
_EMBEDDING, _HEAD = "embedding.wte.weight", "head.lm_head.weight"  # one tied matrix under two names

# What a layer's parameters are called: in the release, and in a `ResidualBlock`; its mixer may have more.
_LAYER_PATHS = {
    "seq_layer.in_proj.weight": ("mixer", "in_proj", "kernel"),
    "seq_layer.input_norm.weight": ("mixer_norm", "scale"),
    "seq_layer.out_proj.weight": ("mixer", "out_proj", "kernel"),
    "hidden_layer.fc1.weight": ("mlp", "up", "kernel"),
    "hidden_layer.fc2.weight": ("mlp", "down", "kernel"),
    "hidden_layer.ln.weight": ("mlp_norm", "scale"),
}


def model_from_release(
    state_dict: Mapping[str, Any], model_config: Mapping[str, Any], dtype: Any = jnp.float32
) -> LanguageModel:
    """The language model that a release's weights make.

    Args:
      state_dict: arrays by the release's names, matrices of shape (outputs, inputs); `_orig_mod.` anywhere in a name
        is ignored.
      model_config: the release's `model` configuration; see `model_config_from_release`.
      dtype: of the computation, float32 or bfloat16; parameters are float32.

    Raises:
      ReleaseError: listing names that are missing, unknown, repeated or of a wrong shape, or if head and embedding
        differ.
      ConfigError: as `model_config_from_release`.
    """
    return _fill(state_dict, model_config_from_release(model_config, jnp.dtype(dtype).name))


def release_state_dict(model: LanguageModel) -> dict[str, np.ndarray]:
    """The model's float32 parameters by the release's names; `model_from_release` reads them back unchanged.

    Raises:
      ReleaseError: if the release has no such model.
    """
    if unknown := [kind for kind in model.config.kinds if MIXERS[kind].RELEASE is None]:
        raise ReleaseError(f"the release has no mixer {unknown[0]!r}")
    arrays = {path: np.asarray(param[...]) for path, param in nnx.to_flat_state(nnx.state(model))}
    state_dict = {}
    for name, slot in _slots(model.config).items():
        array = arrays[slot.path] if slot.index is None else arrays[slot.path][slot.index]
        state_dict[name] = np.array(array.T if slot.transposed else array, order="C")
    return state_dict


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a parameter of the release is found in a `LanguageModel`."""

    path: tuple[str, ...]
    index: int | None  # of the layer in a stack
    transposed: bool

    def release_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        shape = shape if self.index is None else shape[1:]
        return shape[::-1] if self.transposed else shape


def _slots(config: ModelConfig) -> dict[str, _Slot]:
    """The slot of every name of the release, in its order."""
    slots = {_EMBEDDING: _Slot(("embedding",), None, transposed=False)}
    for layer in range(config.num_layers):
        repeat, place = divmod(layer, len(config.pattern))
        kind = config.kinds[place]
        own = {f"seq_layer.{name}": ("mixer", *path) for name, path in MIXERS[kind].RELEASE.parameters.items()}
        for name, path in (own | _LAYER_PATHS).items():
            path = ("blocks", block_name(place, kind), *path)
            slots[f"backbone.layers.{layer}.{name}"] = _Slot(path, repeat, transposed=path[-1] == "kernel")
    slots["backbone.ln.weight"] = _Slot(("final_norm", "scale"), None, transposed=False)
    slots[_HEAD] = slots[_EMBEDDING]
    return slots


def _fill(state_dict: Mapping[str, Any], config: ModelConfig) -> LanguageModel:
    graphdef, abstract = abstract_model(config)
    targets = dict(nnx.to_flat_state(abstract))
    slots = _slots(config)
    shapes = {name: slot.release_shape(targets[slot.path].shape) for name, slot in slots.items()}
    arrays = _checked_arrays(state_dict, shapes)
    layers: dict[tuple[str, ...], list[np.ndarray]] = {path: [] for path in targets}
    for name, slot in slots.items():  # layers of a stack come in their order
        layers[slot.path].append(arrays[name].T if slot.transposed else arrays[name])
    filled = {
        path: target.replace(jnp.asarray(layers[path][0] if path[0] != "blocks" else np.stack(layers[path])))
        for path, target in targets.items()
    }
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def _checked_arrays(state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 arrays by their plain names, if they are those of `shapes`."""
    arrays, problems = {}, []
    for name, value in state_dict.items():
        plain = name.replace(_COMPILE_PREFIX, "")
        if plain in arrays:
            problems.append(f"{plain}: there twice, with and without {_COMPILE_PREFIX!r}")
        arrays[plain] = np.asarray(value)
    for name, shape in shapes.items():
        if name not in arrays:
            problems.append(f"{name}: missing, of shape {shape}")
        elif arrays[name].shape != shape:
            problems.append(f"{name}: has shape {arrays[name].shape}, not {shape}")
    problems += [f"{name}: not a parameter of this model" for name in arrays if name not in shapes]
    if problems:
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise ReleaseError(
            f"the weights are not those of the configuration: {'; '.join(problems[:_MAX_PROBLEMS])}{more}"
        )
    if not np.array_equal(arrays[_EMBEDDING], arrays[_HEAD]):
        raise ReleaseError(f"{_HEAD} differs from {_EMBEDDING}; models here have tied embeddings")
    return {name: array.astype(np.float32, copy=False) for name, array in arrays.items()}
