"""The `model` configuration of the PyTorch release of RAT (arXiv 2507.04416), read and written."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from rat_jax.config import ModelConfig
from rat_jax.errors import ConfigError, RatJaxError, shown
from rat_jax.mixers import MIXERS, MixerConfig, kind_of
from rat_jax.mixers.base import ReleaseCell

_HEAD_DIM = 128  # of all released models; an RNN's configuration does not tell
_ROPE_BASE = 10_000  # likewise
_LIMIT = 2**31  # numbers of a configuration are below it
_INIT = {"_name_": "fixed", "initializer_range": 0.02}


class ReleaseError(RatJaxError, ValueError):
    """What cannot be exchanged with the release: weights, a configuration or a file; the message names the entries."""


def model_config_from_release(model_config: Mapping[str, Any], dtype: str = "float32") -> ModelConfig:
    """The model that a release's `model` configuration describes.

    Mixers: those of `MIXERS` that have a `RELEASE` cell, alone or in turns (`seq_cell1` in even layers, `seq_cell` in
    odd ones); with the release's positions for them or with none. Initialisers are not read, as the weights come from
    the file; dropout is not read either, because it does nothing outside training, and training here has none. An RNN,
    whose cell says nothing of heads, gets 128 channels a head, which it does not use.

    Args:
      model_config: nested mappings with the release's names.
      dtype: of the computation, float32 or bfloat16.

    Raises:
      ConfigError: naming the field that is missing, unknown, or set to what the models here do not have.
    """
    model = _Section(model_config, "model")
    model.only("backbone", "embedding", "head")
    backbone, embedding, head = (model.section(name) for name in ("backbone", "embedding", "head"))
    width = backbone.integer("d_model")
    cells = _cells(backbone)
    mixers, num_heads = _mixers(cells, width)
    embedding.only("_name_", "vocab_size", "seq_len", "d_model", "dropout", "init", "pe")
    embedding.expect("_name_", "lm")
    embedding.expect("d_model", width)
    vocab_size = embedding.integer("vocab_size")
    embedding.integer("seq_len")
    head.only("_name_", "vocab_size", "d_model", "init")
    head.expect("_name_", "lm")
    head.expect("d_model", width)
    head.expect("vocab_size", vocab_size)
    pattern, mixers = _named(mixers)
    rope, rope_base = _positions(embedding.section("pe"), mixers, width // num_heads)
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=backbone.integer("num_layers"),
        num_heads=num_heads,
        mlp_width=_mlp_width(backbone.section("hidden_cell"), width),
        pattern=pattern,
        mixers={
            name: dataclasses.replace(mixer, rope=rope, rope_base=rope_base) if _rotation(mixer) else mixer
            for name, mixer in mixers.items()
        },
        dtype=dtype,
    )


def release_model_config(config: ModelConfig, seq_len: int) -> dict[str, Any]:
    """The release's `model` configuration of a model trained on sequences of `seq_len` tokens.

    Raises:
      ReleaseError: if the release has no such model.
    """
    if len(config.pattern) > 2:
        raise ReleaseError(f"the release repeats one or two mixers, not model.pattern {config.pattern}")
    unknown = {
        "num_kv_heads": config.kv_heads != config.num_heads,
        "qk_norm": config.qk_norm,
        "mlp_kind": config.mlp_kind != "gelu",
    }
    for name in (name for name, is_unknown in unknown.items() if is_unknown):
        raise ReleaseError(f"the release has no models with model.{name} {getattr(config, name)!r}")
    mixers = [config.mixers[name] for name in config.pattern]
    rotating = [mixer for mixer in mixers if _cell(mixer).rotation is not None]
    rotations = {(mixer.rope, mixer.rope_base) for mixer in rotating}
    if len(rotations) > 1:
        names = list(dict.fromkeys(_cell(mixer).name for mixer in rotating))
        raise ReleaseError(f"the release has one rope and rope_base for all mixers, not one each for {names}")
    rope, rope_base = rotations.pop() if rotations else (False, _ROPE_BASE)
    common = {"d_model": config.width, "bias": False, "ln": "rmsnorm", "init": _INIT}
    cells = [common | _cell_values(mixer, config) for mixer in mixers]
    backbone = common | {
        "_name_": "sequence" if len(cells) == 1 else "sequence_interleave",
        "num_layers": config.num_layers,
        "dropout": 0.0,
        "seq_cell": cells[-1],
        "hidden_cell": common | {"_name_": "ffn", "d_ffn": config.mlp_hidden, "act_fn": "gelu", "dropout": 0.0},
    }
    if len(cells) == 2:
        backbone |= {"seq_cell1": cells[0], "interleave_step": 2}
    ends = {"_name_": "lm", "vocab_size": config.vocab_size, "d_model": config.width, "init": _INIT}
    pe = {"_name_": _position_name(mixers if rope else [])}
    if pe["_name_"] != "empty":
        pe |= {"dim": config.head_dim, "base": int(rope_base) if rope_base == int(rope_base) else rope_base}
        if any(_rotation(mixer) == "rope" for mixer in mixers):
            pe |= {"max_seq_len": seq_len}
        for chunk_size in _chunk_sizes(mixers):
            pe |= {"chunk_size": chunk_size, "max_num_chunk": -(-seq_len // chunk_size)}
    return {"backbone": backbone, "head": ends, "embedding": ends | {"seq_len": seq_len, "dropout": 0.0, "pe": pe}}


def _cell(mixer: MixerConfig) -> ReleaseCell:
    cell = MIXERS[kind_of(mixer)].RELEASE
    if cell is None:
        raise ReleaseError(f"the release has no mixer {kind_of(mixer)!r}")
    return cell


def _rotation(mixer: MixerConfig) -> Literal["rope", "interrope"] | None:
    return _cell(mixer).rotation


def _chunk_sizes(mixers: Iterable[MixerConfig]) -> set[int]:
    """Of the mixers that are rotated by chunks."""
    return {mixer.chunk_size for mixer in mixers if _rotation(mixer) == "interrope"}


def _cell_values(mixer: MixerConfig, config: ModelConfig) -> dict[str, Any]:
    cell, settings = _cell(mixer), dataclasses.asdict(mixer)
    heads = {"d_head": config.head_dim, "num_head": config.num_heads, "k_channel": config.head_dim}
    own = {name: settings[field] for name, field in cell.fields.items()}
    return {"_name_": cell.name} | (heads if cell.has_heads else {}) | own


@dataclasses.dataclass(frozen=True)
class _Section:
    """A group of fields of a release's configuration, and its place there."""

    values: Mapping[str, Any]
    path: str

    def only(self, *names: str) -> None:
        for name in self.values:
            if name not in names:
                raise ConfigError(f"{self.path}.{_text(name)} is not known here; known are {', '.join(names)}")

    def get(self, name: str) -> Any:
        if name not in self.values:
            raise ConfigError(f"{self.path}.{name} is missing")
        return self.values[name]

    def section(self, name: str) -> "_Section":
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.path}.{name} must be a group of fields, got {shown(value)}")
        return _Section(value, f"{self.path}.{name}")

    def integer(self, name: str, minimum: int = 1) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not minimum <= value < _LIMIT:
            raise ConfigError(
                f"{self.path}.{name} must be a whole number from {minimum} to {_LIMIT - 1}, got {shown(value)}"
            )
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}.{name} must be a name, got {shown(value)}")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        value = self.get(name)
        if not any(type(value) is type(choice) and value == choice for choice in allowed):
            raise ConfigError(f"{self.path}.{name} must be {' or '.join(map(repr, allowed))}, got {shown(value)}")


def _text(name: Any) -> str:
    """A field's name, which in a stranger's file may be no text."""
    return name if isinstance(name, str) else shown(name)


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


def _mixers(cells: list[_Section], width: int) -> tuple[list[MixerConfig], int]:
    """The mixer of each cell, its rotation left as it is by default; and the number of heads."""
    mixers, num_heads = [], None
    for cell in cells:
        mixer, cell_heads = _mixer(cell, width)
        mixers.append(mixer)
        if cell_heads is not None and num_heads not in (None, cell_heads):
            raise ConfigError(f"{cell.path}.num_head must be that of the other cell, {num_heads}, got {cell_heads}")
        num_heads = cell_heads if num_heads is None else num_heads
    if num_heads is None:
        num_heads = width // _HEAD_DIM if width % _HEAD_DIM == 0 else 1
    return mixers, num_heads


def _mixer(section: _Section, width: int) -> tuple[MixerConfig, int | None]:
    known = {mixer.RELEASE.name: mixer for mixer in MIXERS.values() if mixer.RELEASE is not None}
    section.expect("_name_", *known)
    mixer = known[section.text("_name_")]
    cell, num_heads = mixer.RELEASE, None
    section.expect("d_model", width)
    section.expect("bias", False)
    section.expect("ln", "rmsnorm")
    heads = ("d_head", "num_head", "k_channel") if cell.has_heads else ()
    section.only("_name_", "d_model", "bias", "ln", "init", *heads, *cell.fields)
    if cell.has_heads:
        head_dim, num_heads = section.integer("d_head"), section.integer("num_head")
        if head_dim * num_heads != width:
            raise ConfigError(f"{section.path}: d_head {head_dim} times num_head {num_heads} must be d_model {width}")
        section.expect("k_channel", head_dim)
    settings = {field: section.integer(name, minimum=0) for name, field in cell.fields.items()}
    try:
        return mixer.Config(**settings), num_heads
    except ConfigError as error:
        raise ConfigError(f"{section.path}.{error}") from None


def _named(mixers: list[MixerConfig]) -> tuple[tuple[str, ...], dict[str, MixerConfig]]:
    """Names for a pattern: the kind, and another one for a second setting of it."""
    named: dict[str, MixerConfig] = {}
    pattern = []
    for mixer in mixers:
        kind = kind_of(mixer)
        name = kind if named.setdefault(kind, mixer) == mixer else f"{kind}_2"
        named[name] = mixer
        pattern.append(name)
    return tuple(pattern), named


def _mlp_width(cell: _Section, width: int) -> int:
    cell.only("_name_", "d_model", "ln", "init", "d_ffn", "act_fn", "bias", "dropout")
    cell.expect("_name_", "ffn")
    cell.expect("d_model", width)
    cell.expect("bias", False)
    cell.expect("ln", "rmsnorm")
    cell.expect("act_fn", "gelu")
    return cell.integer("d_ffn")


def _position_name(mixers: Iterable[MixerConfig]) -> str:
    """The release's name of the rotations that mixers need: by token, by chunk, both or none."""
    rotations = {_rotation(mixer) for mixer in mixers}
    match "rope" in rotations, "interrope" in rotations:
        case True, True:
            return "rope_interrope"
        case True, False:
            return "rope"
        case False, True:
            return "interrope"
        case _:
            return "empty"


def _positions(pe: _Section, mixers: Mapping[str, MixerConfig], head_dim: int) -> tuple[bool, float]:
    """Whether the mixers rotate by position, and the base of the rotation."""
    pe.expect("_name_", *dict.fromkeys((_position_name(mixers.values()), "empty")))
    if pe.text("_name_") == "empty":
        pe.only("_name_")
        return False, float(_ROPE_BASE)
    pe.only("_name_", "dim", "base", "max_seq_len", "max_num_chunk", "chunk_size")
    pe.expect("dim", head_dim)
    for chunk_size in _chunk_sizes(mixers.values()):
        pe.expect("chunk_size", chunk_size)
    base = pe.get("base")
    if not isinstance(base, (int, float)) or isinstance(base, bool) or not 1 <= base < _LIMIT:
        raise ConfigError(f"{pe.path}.base must be a number from 1 to {_LIMIT - 1}, got {shown(base)}")
    return True, float(base)
