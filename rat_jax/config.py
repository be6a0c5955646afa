"""The configuration of a run: types, meanings, defaults and checks.

A config file in `configs/` builds an `ml_collections.ConfigDict` with the values of a run; `config_from_dict` turns it
into the frozen dataclasses below. Their defaults are the only ones in the project; those of mixers are in
`rat_jax.mixers`. Whatever is wrong (an unknown key, a missing key, a wrong type, an impossible combination) raises
`ConfigError` with the name of the field, before any device is touched.
"""

import dataclasses
import difflib
import typing
from collections.abc import Mapping
from typing import Any, Literal

from rat_jax.data_config import DataConfig
from rat_jax.errors import ConfigError, require, shown
from rat_jax.evaluation_config import EvaluationConfig
from rat_jax.fields import describe, fits
from rat_jax.mixers import MIXERS, MixerConfig, ModelShape, kind_of
from rat_jax.paths import absolute_source, local_path

_LARGEST_NUMBER = 2**32  # whole numbers of a config are below it: counts and seeds, which devices hold in 32 bits


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig(ModelShape):
    """A decoder-only language model: embedding, residual blocks, norm, logits through the tied embedding."""

    vocab_size: int  # V
    num_layers: int
    mlp_width: int | None = None  # F; None: 4 D, as in the release of arXiv 2507.04416
    mlp_kind: Literal["gelu", "geglu", "swiglu"] = "gelu"  # W_2 gelu(W_1 x), or W_2 (f(W_1 x) * W_3 x), f gelu or silu
    pattern: tuple[str, ...]  # the mixer of each layer, repeated over the layers: kinds of `MIXERS`, names of `mixers`
    # Settings of the names in `pattern`; a kind that is not there has its defaults. Under another name than its kind a
    # second setting of one kind can be had. What `pattern` does not name is dropped.
    mixers: Mapping[str, MixerConfig] = dataclasses.field(default_factory=dict, hash=False)
    # What the backward pass recomputes: "none"; "block": each block from its input; "dots": all but matmul and kernel
    # outputs.
    remat: Literal["none", "block", "dots"] = "none"
    # `unroll` of the scan over layers. 1 compiles fastest; num_layers / len(pattern) removes the loop and its
    # gradient-stacking copies.
    scan_unroll: int = 1

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of mixer of each name in `pattern`."""
        return tuple(kind_of(self.mixers[name]) for name in self.pattern)

    @property
    def mlp_hidden(self) -> int:
        """F."""
        return 4 * self.width if self.mlp_width is None else self.mlp_width

    @property
    def num_repeats(self) -> int:
        """How often the pattern is repeated."""
        return self.num_layers // len(self.pattern)

    def __post_init__(self):
        super().__post_init__()
        for name in ("vocab_size", "num_layers", "mlp_hidden", "scan_unroll"):
            label = "mlp_width" if name == "mlp_hidden" else name
            require(getattr(self, name) >= 1, f"{label} must be 1 or more, got {getattr(self, name)}")
        require(len(self.pattern) >= 1, "pattern must name at least one mixer")
        require(
            self.num_layers % len(self.pattern) == 0,
            f"num_layers must be a multiple of the length of pattern, got num_layers {self.num_layers} and "
            f"pattern {self.pattern}",
        )
        fields = {field.name for field in dataclasses.fields(self)}
        for name, settings in self.mixers.items():
            require(
                name not in fields,
                f"mixers[{name!r}] has the name of a field of {type(self).__name__}: give it another name",
            )
            require(
                name not in MIXERS or kind_of(settings) == name,
                f"mixers[{name!r}] is the setting of another kind, {kind_of(settings)!r}: give it another name",
            )
        named = {name: self._settings(place, name) for place, name in enumerate(self.pattern)}
        object.__setattr__(self, "pattern", tuple(self.pattern))
        object.__setattr__(self, "mixers", named)
        for name, settings in named.items():
            try:
                settings.check(self)
            except ConfigError as error:
                raise ConfigError(f"{name}.{error}") from None

    def _settings(self, index: int, name: str) -> MixerConfig:
        if name in self.mixers:
            return self.mixers[name]
        known = ", ".join(repr(kind) for kind in (*MIXERS, *(name for name in self.mixers if name not in MIXERS)))
        require(name in MIXERS, f"pattern[{index}] must be one of {known}; got {name!r}")
        return MIXERS[name].Config()


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay on every parameter, linear warm-up, cosine decay, clipping by global norm.

    Defaults are the recipe of arXiv 2507.04416 at 1.3 billion parameters.
    """

    learning_rate: float = 8e-4  # peak
    # Where the cosine ends, one step after the last: the last step's is a little higher (`rat_jax.training.optimizer`).
    min_learning_rate: float = 1e-6
    warmup_fraction: float = (
        0.05  # of all steps; the first has learning_rate / (steps of the warm-up), or learning_rate
    )
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0  # gradients are scaled down to this global L2 norm
    accumulation_steps: int = 1  # parts a batch is cut into, one after the other; the loss does not depend on it

    def __post_init__(self):
        require(self.learning_rate > 0, f"learning_rate must be above 0, got {self.learning_rate}")
        require(
            0 <= self.min_learning_rate <= self.learning_rate,
            f"min_learning_rate must lie in [0, learning_rate], got {self.min_learning_rate}",
        )
        require(0 <= self.warmup_fraction <= 1, f"warmup_fraction must lie in [0, 1], got {self.warmup_fraction}")
        for name in ("beta1", "beta2"):
            require(0 <= getattr(self, name) < 1, f"{name} must lie in [0, 1), got {getattr(self, name)}")
        require(self.epsilon > 0, f"epsilon must be above 0, got {self.epsilon}")
        require(self.weight_decay >= 0, f"weight_decay must be 0 or more, got {self.weight_decay}")
        require(self.clip_norm > 0, f"clip_norm must be above 0, got {self.clip_norm}")
        require(self.accumulation_steps >= 1, f"accumulation_steps must be 1 or more, got {self.accumulation_steps}")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How long to train, what to report and keep on the way, and what becomes of bad batches.

    A skipped batch leaves parameters and optimizer state as they are, bit for bit; the order of the data and the number
    of steps stay.
    """

    num_steps: int
    log_every_steps: int = 10
    validate_every_steps: int = 1000
    validation_batches: int = 4  # of `data.global_batch_size` sequences, evenly spread; fewer if the split has fewer
    checkpoint_every_steps: int = 1000
    checkpoint_every_minutes: float | None = None  # too, after such a time without one; None: by steps alone
    checkpoints_to_keep: int = 2  # the newest ones
    wandb_project: str | None = None  # log to this Weights & Biases project too
    on_non_finite: Literal["stop", "skip"] = "stop"  # a loss or gradient that is no finite number
    on_spike: Literal["ignore", "report", "skip"] = "ignore"  # a loss far above those before it
    spike_factor: float = 2.0  # a spike is above so many times the median ...
    spike_window_steps: int = 100  # ... of the losses of so many steps
    max_skips_in_a_row: int = 10  # the next one ends the run
    profile_step: int | None = None  # the first of the steps, from 1, whose trace is written to WORKDIR/profile
    profile_num_steps: int = 3

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int:
                require(value >= 1, f"{field.name} must be 1 or more, got {value}")
        require(self.spike_factor > 1, f"spike_factor must be above 1, got {self.spike_factor}")
        minutes, profiled = self.checkpoint_every_minutes, self.profile_step
        require(minutes is None or minutes > 0, f"checkpoint_every_minutes must be above 0, got {minutes}")
        require(profiled is None or profiled >= 1, f"profile_step must be 1 or more, got {profiled}")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh; one of them may be -1, meaning all devices that remain."""

    data: int = 1  # copies of the model, each with its share of the batch
    fsdp: int = -1  # parts that parameters, optimizer state and batch are cut into
    context: int = 1  # parts that the tokens of each sequence are cut into; parameters are cut as by fsdp
    tensor: int = 1  # parts that heads, MLPs and the vocabulary are cut into

    def __post_init__(self):
        sizes = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        for name, size in sizes.items():
            require(size >= 1 or size == -1, f"{name} must be 1 or more, or -1, got {size}")
        open_ended = [name for name, size in sizes.items() if size == -1]
        require(len(open_ended) < 2, f"{' and '.join(open_ended)} cannot all be -1")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What a new run starts from instead of random parameters. A run that resumes does not read it again.

    The schedule of the learning rate and the order of the data begin anew; another `seed` gives another order.
    """

    # A workdir, a folder of safetensors files (`rat_jax.checkpoints.weights`) or a `.pth` file of the PyTorch release;
    # None: random parameters.
    path: str | None = None
    step: int | None = None  # of a workdir; None: its newest good checkpoint
    optimizer: bool = False  # True: the optimizer's running means and their count, too; of the workdir of a run

    def __post_init__(self):
        require(self.step is None or self.step >= 0, f"step must be 0 or more, got {self.step}")
        for name, given in (("step", self.step is not None), ("optimizer", self.optimizer)):
            require(self.path is not None or not given, f"{name} is of what path names, and path is None")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that decides what a run computes."""

    model: ModelConfig
    data: DataConfig
    training: TrainingConfig
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    init: InitConfig = InitConfig()
    evaluation: EvaluationConfig = EvaluationConfig()  # noqa: RUF009  # frozen
    seed: int = 0  # of the initial parameters and of the order of the data

    def __post_init__(self):
        require(
            self.data.global_batch_size % self.optimizer.accumulation_steps == 0,
            f"data.global_batch_size must be a multiple of optimizer.accumulation_steps, got "
            f"{self.data.global_batch_size} and {self.optimizer.accumulation_steps}",
        )
        require(
            self.data.first_target_id < self.model.vocab_size,
            f"data.first_target_id must be below model.vocab_size {self.model.vocab_size}, or no target counts; got "
            f"{self.data.first_target_id}",
        )


def config_from_dict(values: Mapping[str, Any]) -> Config:
    """The config that a `ConfigDict` (or a nested dict, as saved with a checkpoint) holds.

    Raises:
      ConfigError: naming the field that is unknown, missing, of a wrong type or out of range.
    """
    return _build(Config, values, "config")


def config_to_dict(config: Any) -> dict[str, Any]:
    """A config, or a part of one, as a nested dict that `json` can write and `config_from_dict` reads back.

    The settings of a model's mixers become groups of the model under their names.
    """
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    mixers = values.pop("mixers", {})
    groups = {name: config_to_dict(value) for name, value in values.items() if dataclasses.is_dataclass(value)}
    if "corpora" in values:
        groups["corpora"] = {name: config_to_dict(corpus) for name, corpus in values["corpora"].items()}
    for name, settings in mixers.items():
        kind = kind_of(settings)
        groups[name] = ({} if name == kind else {"kind": kind}) | config_to_dict(settings)
    return values | groups


def with_absolute_paths(config: Config) -> Config:
    """The config with paths that mean the same wherever a later command is given.

    Raises:
      PathError: if one names nothing that can be opened.
    """
    data, init, evaluation = config.data, config.init, config.evaluation
    if data.path:
        data = dataclasses.replace(data, path=str(local_path(data.path, "config.data.path")))
    corpora = {
        name: dataclasses.replace(corpus, path=str(local_path(corpus.path, f"config.data.corpora.{name}.path")))
        for name, corpus in data.corpora.items()
    }
    data = dataclasses.replace(data, corpora=corpora)
    if init.path is not None:
        init = dataclasses.replace(init, path=str(local_path(init.path, "config.init.path")))
    ruler, answers, tasks = evaluation.ruler, evaluation.answers, evaluation.tasks
    if ruler.essay is not None:
        ruler = dataclasses.replace(ruler, essay=absolute_source(ruler.essay, "config.evaluation.ruler.essay"))
    if answers.file is not None:
        answers = dataclasses.replace(answers, file=str(local_path(answers.file, "config.evaluation.answers.file")))
    if tasks.folder is not None:
        tasks = dataclasses.replace(tasks, folder=str(local_path(tasks.folder, "config.evaluation.tasks.folder")))
    evaluation = dataclasses.replace(evaluation, ruler=ruler, answers=answers, tasks=tasks)
    return dataclasses.replace(config, data=data, init=init, evaluation=evaluation)


def _build(cls: type, values: Mapping[str, Any], path: str) -> Any:
    if not hasattr(values, "items"):
        raise ConfigError(f"{path} must be a group of fields, got {shown(values)}")
    values = {str(name): value for name, value in values.items()}
    mixers = {"mixers": _mixers(values, path)} if cls is ModelConfig else {}
    hints = typing.get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name not in mixers]
    for key, value in values.items():
        if cls is ModelConfig and key not in hints and hasattr(value, "items"):
            raise ConfigError(
                f"{path}.{key} is a group without a kind: a setting of a mixer under a name of its own has the field "
                f"kind, one of {', '.join(map(repr, MIXERS))}"
            )
        if key not in (names := [field.name for field in fields]):
            near = difflib.get_close_matches(key, names, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else f"; the fields are {', '.join(names)}"
            raise ConfigError(f"{path}.{key} is not a field of {cls.__name__}{hint}")
    for field in fields:
        has_default = (field.default, field.default_factory) != (dataclasses.MISSING, dataclasses.MISSING)
        if field.name not in values and not has_default:
            raise ConfigError(f"{path}.{field.name} is missing")
    given = {name: _convert(hints[name], value, f"{path}.{name}") for name, value in values.items()}
    try:
        return cls(**given, **mixers)
    except ConfigError as error:
        if str(error).startswith("config"):  # a part's own error, already with its path
            raise
        raise ConfigError(f"{path}.{error}") from None


def _mixers(values: dict[str, Any], path: str) -> dict[str, MixerConfig]:
    """Takes the groups of a model's values that are settings of mixers: named as a kind, or with their `kind`."""
    mixers = {}
    for name in [name for name, value in values.items() if name in MIXERS or _has_kind(value)]:
        group = values.pop(name)
        if not hasattr(group, "items"):
            raise ConfigError(f"{path}.{name} must be a group of fields, got {shown(group)}")
        settings = dict(group.items())
        kind = settings.pop("kind", name)
        if not isinstance(kind, str) or kind not in MIXERS or (name in MIXERS and kind != name):
            known = repr(name) if name in MIXERS else f"one of {', '.join(map(repr, MIXERS))}"
            raise ConfigError(f"{path}.{name}.kind must be {known}; got {shown(kind)}")
        mixers[name] = _build(MIXERS[kind].Config, settings, f"{path}.{name}")
    return mixers


def _has_kind(value: Any) -> bool:
    return hasattr(value, "items") and "kind" in value


def _convert(hint: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, path)
    if origin is Mapping and hasattr(value, "items"):
        return {str(name): _convert(arguments[1], item, f"{path}.{name}") for name, item in value.items()}
    if origin is tuple and isinstance(value, (tuple, list)):
        return tuple(_convert(arguments[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if isinstance(value, int) and abs(value) >= _LARGEST_NUMBER:
        raise ConfigError(f"{path} must be below 2**32, got {shown(value)}")
    require(fits(hint, value), f"{path} must be {describe(hint)}, got {shown(value)}")
    return float(value) if hint is float else value
