"""The configuration of a run: types, meanings and checks. Values live in `configs/`.

A config file builds an `ml_collections.ConfigDict`; `config_from_dict` turns it into the frozen dataclasses below.
A dataclass has no defaults, so that every value of a run can be read in one file (and in the checkpoint). Whatever is
wrong (an unknown key, a missing key, a wrong type, an impossible combination) raises `ConfigError` with the name of the
field, before any device is touched.
"""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal

from rat_jax.errors import ConfigError

MixerKind = Literal["attention", "local_attention", "rnn", "rat", "rattention"]
MIXER_KINDS: tuple[str, ...] = typing.get_args(MixerKind)


@dataclasses.dataclass(frozen=True)
class AttentionConfig:
    """Causal softmax attention over all earlier tokens."""

    rope: bool  # rotate queries and keys by their position; False is NoPE
    rope_base: float  # longest wavelength of the rotation is 2 pi rope_base tokens

    def __post_init__(self):
        _require(self.rope_base > 1, f"rope_base must be above 1, got {self.rope_base}")


@dataclasses.dataclass(frozen=True)
class LocalAttentionConfig:
    """Causal softmax attention within a sliding window."""

    window: int  # earlier tokens that a token sees beside itself
    rope: bool  # as in AttentionConfig
    rope_base: float

    def __post_init__(self):
        _require(self.window >= 0, f"window must be 0 or more, got {self.window}")
        _require(self.rope_base > 1, f"rope_base must be above 1, got {self.rope_base}")


@dataclasses.dataclass(frozen=True)
class RnnConfig:
    """Gated linear recurrence over the whole sequence."""

    max_timescale: int  # tokens; forget gates start with memory lengths spread over 1 .. max_timescale

    def __post_init__(self):
        _require(self.max_timescale >= 3, f"max_timescale must be 3 tokens or more, got {self.max_timescale}")


@dataclasses.dataclass(frozen=True)
class RatConfig:
    """Gated linear recurrence inside chunks, softmax attention across chunk summaries."""

    chunk_size: int  # L, tokens; 1 is attention, the sequence length is an RNN
    num_groups: int  # G, query and key projections; head n uses group n mod G
    rope: bool  # rotate by the chunk's position
    rope_base: float

    def __post_init__(self):
        _require(self.chunk_size >= 1, f"chunk_size must be 1 or more, got {self.chunk_size}")
        _require(self.num_groups >= 1, f"num_groups must be 1 or more, got {self.num_groups}")
        _require(self.rope_base > 1, f"rope_base must be above 1, got {self.rope_base}")


@dataclasses.dataclass(frozen=True)
class RattentionConfig:
    """Softmax attention within a sliding window, linear attention over what has left it."""

    window: int  # as in LocalAttentionConfig
    rope: bool  # of the window's attention, as in AttentionConfig
    rope_base: float
    feature_map: Literal["softmax", "relu"]  # features of the linear branch: [m(x), m(-x)] over the channels of a head
    meta_tokens: int  # learned pairs of key and value that the linear branch starts from; 0 starts it from nothing
    learned_scales: bool  # multiply the linear branch's queries and keys by learned vectors before the feature map

    def __post_init__(self):
        _require(self.window >= 0, f"window must be 0 or more, got {self.window}")
        _require(self.rope_base > 1, f"rope_base must be above 1, got {self.rope_base}")
        _require(self.meta_tokens >= 0, f"meta_tokens must be 0 or more, got {self.meta_tokens}")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model: embedding, residual blocks, norm, logits through the tied embedding."""

    vocab_size: int  # V
    width: int  # D, channels of the residual stream
    num_layers: int
    num_heads: int  # N; a head has width / num_heads channels
    num_kv_heads: int | None  # K of attention, local_attention and rattention, each for N / K heads; None: N
    qk_norm: bool  # RMS norm of each head's queries and keys, before they are rotated, in those three mixers
    mlp_width: int  # F
    mlp_kind: Literal["gelu", "geglu", "swiglu"]  # W_2 gelu(W_1 x), or W_2 (f(W_1 x) * W_3 x) with f gelu or silu
    pattern: tuple[MixerKind, ...]  # mixer of each layer, repeated over the layers
    attention: AttentionConfig
    local_attention: LocalAttentionConfig
    rnn: RnnConfig
    rat: RatConfig
    rattention: RattentionConfig
    dtype: Literal["float32", "bfloat16"]  # of activations and matrix products; parameters are always float32
    # Recompute in the backward pass: nothing, whole blocks, all but the results of matrix products and kernels.
    remat: Literal["none", "block", "dots"]
    # Repeats of the pattern that the loop over layers lays out one after the other. 1 compiles soonest; all of them,
    # num_layers / len(pattern), or more leave nothing to be copied into stacks for the backward pass.
    scan_unroll: int

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    def __post_init__(self):
        for name in ("vocab_size", "width", "num_layers", "num_heads", "mlp_width", "scan_unroll"):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more, got {getattr(self, name)}")
        _require(len(self.pattern) >= 1, "pattern must name at least one mixer")
        _require(
            self.width % self.num_heads == 0,
            f"width must be a multiple of num_heads, got width {self.width} and num_heads {self.num_heads}",
        )
        _require(
            self.num_layers % len(self.pattern) == 0,
            f"num_layers must be a multiple of the length of pattern, got num_layers {self.num_layers} and "
            f"pattern {self.pattern}",
        )
        _require(
            self.kv_heads >= 1 and self.num_heads % self.kv_heads == 0,
            f"num_heads must be a multiple of num_kv_heads, got num_heads {self.num_heads} and num_kv_heads "
            f"{self.num_kv_heads}",
        )
        if "rat" in self.pattern:
            _require(
                self.num_heads % self.rat.num_groups == 0,
                f"num_heads must be a multiple of rat.num_groups, got num_heads {self.num_heads} and "
                f"rat.num_groups {self.rat.num_groups}",
            )
        for kind in ("attention", "local_attention", "rat", "rattention"):
            _require(
                kind not in self.pattern or not getattr(self, kind).rope or self.head_dim % 2 == 0,
                f"{kind}.rope needs an even number of channels a head, got width / num_heads = {self.head_dim}",
            )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Token files, as `python -m rat_jax.data.prepare` writes them, and how they are cut into batches."""

    path: str  # folder with the token files of the `train` and `validation` splits
    seq_len: int  # T, tokens of a training sequence
    global_batch_size: int  # sequences of an optimizer step, over all hosts and devices
    segment_documents: bool  # True: no mixer looks across a document's end; False: the release's behaviour
    first_target_id: int  # targets of lower ids do not count in the loss; 0: all count
    num_workers: int  # processes that read ahead; 0 reads in the main process

    def __post_init__(self):
        for name in ("seq_len", "global_batch_size"):
            _require(getattr(self, name) >= 1, f"{name} must be 1 or more, got {getattr(self, name)}")
        _require(self.first_target_id >= 0, f"first_target_id must be 0 or more, got {self.first_target_id}")
        _require(self.num_workers >= 0, f"num_workers must be 0 or more, got {self.num_workers}")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay on every parameter, linear warm-up, cosine decay, clipping by global norm."""

    learning_rate: float  # peak
    min_learning_rate: float  # at the last step
    warmup_fraction: float  # of all steps
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    clip_norm: float  # gradients are scaled down to this global L2 norm
    accumulation_steps: int  # parts a batch is cut into, one after the other; the loss does not depend on it

    def __post_init__(self):
        _require(self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}")
        _require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate must lie in [0, learning_rate], got {self.min_learning_rate}",
        )
        _require(0 <= self.warmup_fraction <= 1, f"warmup_fraction must lie in [0, 1], got {self.warmup_fraction}")
        for name in ("beta1", "beta2"):
            _require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), got {getattr(self, name)}")
        _require(self.epsilon > 0, f"epsilon must be above 0, got {self.epsilon}")
        _require(self.weight_decay >= 0, f"weight_decay must be 0 or more, got {self.weight_decay}")
        _require(self.clip_norm > 0, f"clip_norm must be above 0, got {self.clip_norm}")
        _require(self.accumulation_steps >= 1, f"accumulation_steps must be 1 or more, got {self.accumulation_steps}")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long to train, and what to report and keep on the way."""

    num_steps: int
    log_every_steps: int
    validate_every_steps: int
    validation_batches: int  # of `data.global_batch_size` sequences each, evenly spread; fewer if the split has fewer
    checkpoint_every_steps: int
    checkpoints_to_keep: int  # the newest ones
    wandb_project: str | None  # log to this Weights & Biases project too

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "wandb_project":
                _require(value >= 1, f"{field.name} must be 1 or more, got {value}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of the two may be -1, meaning all devices that remain."""

    data: int  # copies of the model, each with its share of the batch
    fsdp: int  # parts that parameters, optimizer state and batch are cut into

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _require(value >= 1 or value == -1, f"{field.name} must be 1 or more, or -1, got {value}")
        _require((self.data, self.fsdp) != (-1, -1), "data and fsdp cannot both be -1")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes."""

    seed: int  # of the initial parameters and of the order of the data
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    training: TrainingConfig
    mesh: MeshConfig

    def __post_init__(self):
        _require(
            self.data.global_batch_size % self.optimizer.accumulation_steps == 0,
            f"data.global_batch_size must be a multiple of optimizer.accumulation_steps, got "
            f"{self.data.global_batch_size} and {self.optimizer.accumulation_steps}",
        )


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The config that a `ConfigDict` (or a nested dict, as saved with a checkpoint) holds.

    Raises:
      ConfigError: naming the field that is unknown, missing, of a wrong type or out of range.
    """
    return _build(Config, values, "config")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config, or a part of one, as a nested dict that `json` can write and `config_from_dict` reads back."""
    return dataclasses.asdict(config)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(cls)
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; the fields are {', '.join(names)}"
            raise ConfigError(f"{path}.{key} is not a field of {cls.__name__}{hint}")
    for name in names:
        if name not in values:
            raise ConfigError(f"{path}.{name} is missing")
    fields = {name: _convert(hints[name], values[name], f"{path}.{name}") for name in names}
    try:
        return cls(**fields)
    except ConfigError as error:
        if str(error).startswith("config"):  # a part's own error, already with its path
            raise
        raise ConfigError(f"{path}.{error}") from None


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping) and not hasattr(value, "items"):
            raise ConfigError(f"{path} must be a group of fields, got {value!r}")
        return _build(hint, value, path)
    if origin in (typing.Union, types.UnionType):  # only `X | None` is used
        return None if value is None else _convert(arguments[0], value, path)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{path} must be one of {', '.join(map(repr, arguments))}; got {value!r}")
        return value
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise ConfigError(f"{path} must be a tuple, got {value!r}")
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be of type {hint.__name__}, got {value!r}")
    if hint is float and not math.isfinite(value):
        raise ConfigError(f"{path} must be finite, got {value!r}")
    return value
