"""Weights and configurations of the PyTorch release of RAT (arXiv 2507.04416), read and written.

  python -m rat_jax.release import FILE.pth WORKDIR
  python -m rat_jax.release export WORKDIR FILE.pth

Only these two commands need torch; the functions here work on arrays and on the release's `model` configuration.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rat_jax.config import (
    AttentionConfig,
    ConfigError,
    LocalAttentionConfig,
    ModelConfig,
    RatConfig,
    RnnConfig,
)
from rat_jax.model import LanguageModel, block_name

COMPILE_PREFIX = "_orig_mod."  # which torch.compile puts before the names of what it wraps
EMBEDDING, HEAD = "embedding.wte.weight", "head.lm_head.weight"  # one tied matrix under two names

# What a layer's parameters are called: in the release, and in a `ResidualBlock`.
_LAYER_PATHS = {
    "seq_layer.gate_bias": ("mixer", "gate_bias"),
    "seq_layer.in_proj.weight": ("mixer", "in_proj", "kernel"),
    "seq_layer.input_norm.weight": ("mixer_norm", "scale"),
    "seq_layer.out_proj.weight": ("mixer", "out_proj", "kernel"),
    "hidden_layer.fc1.weight": ("mlp", "up", "kernel"),
    "hidden_layer.fc2.weight": ("mlp", "down", "kernel"),
    "hidden_layer.ln.weight": ("mlp_norm", "scale"),
}
_GATED_KINDS = ("rnn", "rat")


class ReleaseError(ValueError):
    """Weights or a configuration that the models here cannot hold; the message names the entries."""


def model_from_release(
    state_dict: Mapping[str, Any], model_config: Mapping[str, Any], dtype: Any = jnp.float32
) -> LanguageModel:
    """The language model that a release's weights make.

    Args:
      state_dict: arrays by the release's names, linear weights of shape (outputs, inputs); `_orig_mod.` anywhere in a
        name is ignored.
      model_config: the release's `model` configuration; see `model_config_from_release`.
      dtype: of the computation, float32 or bfloat16; parameters are float32.

    Raises:
      ReleaseError: listing every name that is missing, unknown, repeated or of a wrong shape, or if head and embedding
        differ.
      ConfigError: as `model_config_from_release`.
    """
    config = model_config_from_release(model_config, jnp.dtype(dtype).name)
    graphdef, state = nnx.split(nnx.eval_shape(lambda: LanguageModel(config, rngs=nnx.Rngs(0))))
    flat = dict(nnx.to_flat_state(state))
    slots = _slots(config)
    arrays = _checked_arrays(state_dict, {name: slot.release_shape(flat) for name, slot in slots.items()})
    values = {}
    for name, slot in slots.items():
        array = arrays[name].T if slot.transposed else arrays[name]
        values.setdefault(slot.path, {})[slot.index] = array
    filled = {
        path: variable.replace(
            jnp.asarray(parts[None] if None in parts else np.stack([parts[i] for i in range(len(parts))]))
        )
        for path, variable in flat.items()
        for parts in [values[path]]
    }
    return nnx.merge(graphdef, nnx.from_flat_state(filled))


def release_state_dict(model: LanguageModel) -> dict[str, np.ndarray]:
    """The model's float32 parameters under the release's names, in its order; `model_from_release` reads them back."""
    flat = dict(nnx.to_flat_state(nnx.state(model)))
    arrays = {path: np.asarray(variable[...]) for path, variable in flat.items()}
    state_dict = {}
    for name, slot in _slots(model.config).items():
        array = arrays[slot.path] if slot.index is None else arrays[slot.path][slot.index]
        state_dict[name] = np.array(array.T if slot.transposed else array, order="C")
    return state_dict


def model_config_from_release(model_config: Mapping[str, Any], dtype: str = "float32") -> ModelConfig:
    """The model that a release's `model` configuration describes.

    Mixers: attention, local_attention, rnn, rat, alone or in turns (`seq_cell1` in even layers, `seq_cell` in odd
    ones); with the release's positions for them or with none. Initialisers are not read, as the weights come from the
    file; dropout is not read either, because it does nothing outside training, and training here has none. Kinds of
    mixers that the model does not have get the paper's values.

    Raises:
      ConfigError: naming the field that is missing, unknown, or set to what the models here do not have.
    """
    model = _Section(model_config, "model")
    model.only("backbone", "embedding", "head")
    backbone, embedding, head = (model.section(name) for name in ("backbone", "embedding", "head"))
    width = backbone.integer("d_model")
    cells = _cells(backbone)
    mlp_width = _mlp_width(backbone.section("hidden_cell"), width)
    embedding.only("_name_", "vocab_size", "seq_len", "d_model", "dropout", "init", "pe")
    embedding.expect("_name_", "lm")
    embedding.expect("d_model", width)
    vocab_size, seq_len = embedding.integer("vocab_size"), embedding.integer("seq_len")
    head.only("_name_", "vocab_size", "d_model", "init")
    head.expect("_name_", "lm")
    head.expect("d_model", width)
    head.expect("vocab_size", vocab_size)

    num_heads, mixers = 1, {}  # an RNN has no heads
    for cell in cells:
        kind, mixer = _mixer(cell, width)
        if mixers.setdefault(kind, mixer) != mixer:
            raise ConfigError(f"{cell.path} differs from the other {kind!r} cell; a model here has one setting a kind")
        if kind != "rnn":
            num_heads = cell.integer("num_head")
    for cell in cells:
        if cell.text("_name_") != "rnn":
            cell.expect("num_head", num_heads)
    rope, rope_base = _positions(embedding.section("pe"), mixers, width // num_heads)
    chosen = {
        "attention": {},
        "local_attention": {"window": 1024},
        "rnn": {"max_timescale": seq_len},
        "rat": {"chunk_size": 16, "num_groups": 2},
    } | mixers
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=backbone.integer("num_layers"),
        num_heads=num_heads,
        mlp_width=mlp_width,
        pattern=tuple(cell.text("_name_") for cell in cells),
        attention=AttentionConfig(**chosen["attention"], rope=rope, rope_base=rope_base),
        local_attention=LocalAttentionConfig(**chosen["local_attention"], rope=rope, rope_base=rope_base),
        rnn=RnnConfig(**chosen["rnn"]),
        rat=RatConfig(**chosen["rat"], rope=rope, rope_base=rope_base),
        dtype=dtype,
        remat="none",
    )


@dataclasses.dataclass(frozen=True)
class _Section:
    """A group of fields of a release's configuration, and where it stands there."""

    values: Mapping[str, Any]
    path: str

    def only(self, *names: str) -> None:
        for name in self.values:
            if name not in names:
                raise ConfigError(f"{self.path}.{name} is not a field that is known here")

    def get(self, name: str) -> Any:
        if name not in self.values:
            raise ConfigError(f"{self.path}.{name} is missing")
        return self.values[name]

    def section(self, name: str) -> "_Section":
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.path}.{name} must be a group of fields, got {value!r}")
        return _Section(value, f"{self.path}.{name}")

    def integer(self, name: str) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigError(f"{self.path}.{name} must be a whole number of 0 or more, got {value!r}")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}.{name} must be a name, got {value!r}")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        if self.get(name) not in allowed:
            raise ConfigError(f"{self.path}.{name} must be {' or '.join(map(repr, allowed))}, got {self.get(name)!r}")


def _cells(backbone: _Section) -> list[_Section]:
    """The mixers of the layers, in the order in which they take turns."""
    common = ("_name_", "num_layers", "d_model", "bias", "ln", "dropout", "init", "seq_cell", "hidden_cell")
    backbone.expect("_name_", "sequence", "sequence_interleave")
    backbone.expect("bias", False)
    backbone.expect("ln", "rmsnorm")
    if backbone.text("_name_") == "sequence":
        backbone.only(*common)
        return [backbone.section("seq_cell")]
    backbone.only(*common, "seq_cell1", "interleave_step")
    backbone.expect("interleave_step", 2)
    return [backbone.section("seq_cell1"), backbone.section("seq_cell")]


def _mixer(cell: _Section, width: int) -> tuple[str, dict[str, int]]:
    """A cell's kind, and the fields of its config other than rope."""
    cell.expect("_name_", "attention", "local_attention", "rnn", "rat")
    kind = cell.text("_name_")
    cell.expect("d_model", width)
    cell.expect("bias", False)
    cell.expect("ln", "rmsnorm")
    common, heads = ("_name_", "d_model", "bias", "ln", "init"), ("d_head", "num_head", "k_channel")
    if kind == "rnn":
        cell.only(*common, "seq_len")
        return kind, {"max_timescale": cell.integer("seq_len")}
    if cell.integer("d_head") * cell.integer("num_head") != width:
        raise ConfigError(
            f"{cell.path}: d_head times num_head must be d_model, got {cell.get('d_head')} x {cell.get('num_head')} "
            f"and {width}"
        )
    cell.expect("k_channel", cell.integer("d_head"))
    match kind:
        case "attention":
            cell.only(*common, *heads)
            return kind, {}
        case "local_attention":
            cell.only(*common, *heads, "window_size")
            return kind, {"window": cell.integer("window_size")}
        case "rat":
            cell.only(*common, *heads, "ngroups", "chunk_size")
            return kind, {"chunk_size": cell.integer("chunk_size"), "num_groups": cell.integer("ngroups")}


def _mlp_width(cell: _Section, width: int) -> int:
    cell.only("_name_", "d_model", "ln", "init", "d_ffn", "act_fn", "bias", "dropout")
    cell.expect("_name_", "ffn")
    cell.expect("d_model", width)
    cell.expect("bias", False)
    cell.expect("ln", "rmsnorm")
    cell.expect("act_fn", "gelu")
    return cell.integer("d_ffn")


def position_name(kinds: set[str]) -> str:
    """The release's name of the rotations that these kinds of mixers need: by token, by chunk, both or none."""
    by_token, by_chunk = bool(kinds & {"attention", "local_attention"}), "rat" in kinds
    return {(0, 0): "empty", (1, 0): "rope", (0, 1): "interrope", (1, 1): "rope_interrope"}[by_token, by_chunk]


def _positions(pe: _Section, mixers: Mapping[str, Mapping[str, int]], head_dim: int) -> tuple[bool, float]:
    """Whether the mixers rotate by position, and the base of the rotation."""
    pe.expect("_name_", *dict.fromkeys((position_name(set(mixers)), "empty")))
    if pe.text("_name_") == "empty":
        pe.only("_name_")
        return set(mixers) == {"rnn"}, 10_000.0  # an RNN never rotates: the value is for mixers that it does not have
    pe.only("_name_", "dim", "base", "max_seq_len", "max_num_chunk", "chunk_size")
    pe.expect("dim", head_dim)
    if "rat" in mixers:
        pe.expect("chunk_size", mixers["rat"]["chunk_size"])
    base = pe.get("base")
    if not isinstance(base, (int, float)) or isinstance(base, bool):
        raise ConfigError(f"{pe.path}.base must be a number, got {base!r}")
    return True, float(base)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """Where a parameter of the release stands in a `LanguageModel`."""

    path: tuple[str, ...]
    index: int | None  # of the layer in a stack
    transposed: bool

    def release_shape(self, flat: Mapping[tuple[str, ...], Any]) -> tuple[int, ...]:
        shape = flat[self.path].shape if self.index is None else flat[self.path].shape[1:]
        return shape[::-1] if self.transposed else shape


def _slots(config: ModelConfig) -> dict[str, _Slot]:
    """The slot of every name of the release, in its order."""
    slots = {EMBEDDING: _Slot(("embedding",), None, transposed=False)}
    for layer in range(config.num_layers):
        repeat, place = divmod(layer, len(config.pattern))
        kind = config.pattern[place]
        for name, path in _LAYER_PATHS.items():
            if name != "seq_layer.gate_bias" or kind in _GATED_KINDS:
                path = ("blocks", block_name(place, kind), *path)
                slots[f"backbone.layers.{layer}.{name}"] = _Slot(path, repeat, transposed=path[-1] == "kernel")
    slots["backbone.ln.weight"] = _Slot(("final_norm", "scale"), None, transposed=False)
    slots[HEAD] = slots[EMBEDDING]
    return slots


def _checked_arrays(state_dict: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    """float32 arrays by their plain names, if they are those of `shapes`."""
    arrays, problems = {}, []
    for name, value in state_dict.items():
        plain = name.replace(COMPILE_PREFIX, "")
        if plain in arrays:
            problems.append(f"{name}: stands there twice, with and without {COMPILE_PREFIX!r}")
        arrays[plain] = np.asarray(value, dtype=np.float32)
    problems += [f"{name}: missing, shape {shape} expected" for name, shape in shapes.items() if name not in arrays]
    problems += [f"{name}: not a parameter of this model" for name in arrays if name not in shapes]
    problems += [
        f"{name}: shape {arrays[name].shape}, {shape} expected"
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != shape
    ]
    if problems:
        raise ReleaseError("the weights do not fit the configuration:\n  " + "\n  ".join(problems))
    if not np.array_equal(arrays[EMBEDDING], arrays[HEAD]):
        raise ReleaseError(f"{HEAD} differs from {EMBEDDING}; the models here have tied embeddings")
    return arrays
