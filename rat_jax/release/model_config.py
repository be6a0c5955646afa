"""The `model` configuration of the PyTorch release of RAT (arXiv 2507.04416), read and written."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rat_jax.config import (
    AttentionConfig,
    ConfigError,
    LocalAttentionConfig,
    ModelConfig,
    RatConfig,
    RattentionConfig,
    RnnConfig,
)
from rat_jax.errors import RatJaxError

_HEAD_DIM = 128  # of all released models; an RNN's configuration does not tell
_ROPE_BASE = 10_000  # likewise
_RATTENTION = RattentionConfig(  # which no released model has
    window=512, rope=True, rope_base=500_000.0, feature_map="softmax", meta_tokens=0, learned_scales=False
)
_INIT = {"_name_": "fixed", "initializer_range": 0.02}


class ReleaseError(RatJaxError, ValueError):
    """What cannot be exchanged with the release: weights, a configuration or a file; the message names the entries."""


def model_config_from_release(model_config: Mapping[str, Any], dtype: str = "float32") -> ModelConfig:
    """The model that a release's `model` configuration describes.

    Mixers: attention, local_attention, rnn, rat, alone or in turns (`seq_cell1` in even layers, `seq_cell` in odd
    ones); with the release's positions for them or with none. Initialisers are not read, as the weights come from the
    file; dropout is not read either, because it does nothing outside training, and training here has none. Kinds of
    mixers that the model does not have get the paper's values, and an RNN its 128 channels a head, which it does not
    use.

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
    vocab_size, seq_len = embedding.integer("vocab_size"), embedding.integer("seq_len")
    head.only("_name_", "vocab_size", "d_model", "init")
    head.expect("_name_", "lm")
    head.expect("d_model", width)
    head.expect("vocab_size", vocab_size)
    rope, rope_base = _positions(embedding.section("pe"), mixers, width // num_heads)

    def rotation(kind):
        return {"rope": rope if kind in mixers else True, "rope_base": rope_base}

    absent = {
        "attention": {},
        "local_attention": {"window": 1024},
        "rnn": {"max_timescale": max(seq_len, 3)},
        "rat": {"chunk_size": 16, "num_groups": 2},
    }
    values = absent | mixers
    return ModelConfig(
        vocab_size=vocab_size,
        width=width,
        num_layers=backbone.integer("num_layers"),
        num_heads=num_heads,
        num_kv_heads=None,
        qk_norm=False,
        mlp_width=_mlp_width(backbone.section("hidden_cell"), width),
        mlp_kind="gelu",
        pattern=tuple(cell.text("_name_") for cell in cells),
        attention=AttentionConfig(**values["attention"], **rotation("attention")),
        local_attention=LocalAttentionConfig(**values["local_attention"], **rotation("local_attention")),
        rnn=RnnConfig(**values["rnn"]),
        rat=RatConfig(**values["rat"], **rotation("rat")),
        rattention=_RATTENTION,
        dtype=dtype,
        remat="none",
        scan_unroll=1,
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
    rotating = [kind for kind in dict.fromkeys(config.pattern) if kind != "rnn"]
    rotations = {(getattr(config, kind).rope, getattr(config, kind).rope_base) for kind in rotating}
    if len(rotations) > 1:
        raise ReleaseError(f"the release has one rope and rope_base for all mixers, not one each for {rotating}")
    rope, rope_base = rotations.pop() if rotations else (False, _ROPE_BASE)
    common = {"d_model": config.width, "bias": False, "ln": "rmsnorm", "init": _INIT}
    cells = [common | _cell(kind, config) for kind in config.pattern]
    backbone = common | {
        "_name_": "sequence" if len(cells) == 1 else "sequence_interleave",
        "num_layers": config.num_layers,
        "dropout": 0.0,
        "seq_cell": cells[-1],
        "hidden_cell": common | {"_name_": "ffn", "d_ffn": config.mlp_width, "act_fn": "gelu", "dropout": 0.0},
    }
    if len(cells) == 2:
        backbone |= {"seq_cell1": cells[0], "interleave_step": 2}
    ends = {"_name_": "lm", "vocab_size": config.vocab_size, "d_model": config.width, "init": _INIT}
    pe = {"_name_": _position_name(set(config.pattern) if rope else set())}
    if pe["_name_"] != "empty":
        pe |= {"dim": config.head_dim, "base": int(rope_base) if rope_base == int(rope_base) else rope_base}
        if set(rotating) - {"rat"}:
            pe |= {"max_seq_len": seq_len}
        if "rat" in rotating:
            pe |= {"chunk_size": config.rat.chunk_size, "max_num_chunk": -(-seq_len // config.rat.chunk_size)}
    return {"backbone": backbone, "head": ends, "embedding": ends | {"seq_len": seq_len, "dropout": 0.0, "pe": pe}}


def _cell(kind: str, config: ModelConfig) -> dict[str, Any]:
    heads = {"d_head": config.head_dim, "num_head": config.num_heads, "k_channel": config.head_dim}
    match kind:
        case "attention":
            return {"_name_": kind} | heads
        case "local_attention":
            return {"_name_": kind} | heads | {"window_size": config.local_attention.window}
        case "rnn":
            return {"_name_": kind, "seq_len": config.rnn.max_timescale}
        case "rat":
            return {"_name_": kind} | heads | {"ngroups": config.rat.num_groups, "chunk_size": config.rat.chunk_size}
        case _:
            raise ReleaseError(f"the release has no mixer {kind!r}")


@dataclasses.dataclass(frozen=True)
class _Section:
    """A group of fields of a release's configuration, and where it stands there."""

    values: Mapping[str, Any]
    path: str

    def only(self, *names: str) -> None:
        for name in self.values:
            if name not in names:
                raise ConfigError(f"{self.path}.{name} is not known here; known are {', '.join(names)}")

    def get(self, name: str) -> Any:
        if name not in self.values:
            raise ConfigError(f"{self.path}.{name} is missing")
        return self.values[name]

    def section(self, name: str) -> "_Section":
        value = self.get(name)
        if not isinstance(value, Mapping):
            raise ConfigError(f"{self.path}.{name} must be a group of fields, got {value!r}")
        return _Section(value, f"{self.path}.{name}")

    def integer(self, name: str, least: int = 1) -> int:
        value = self.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"{self.path}.{name} must be a whole number of {least} or more, got {value!r}")
        return value

    def text(self, name: str) -> str:
        value = self.get(name)
        if not isinstance(value, str):
            raise ConfigError(f"{self.path}.{name} must be a name, got {value!r}")
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        value = self.get(name)
        if not any(value == choice and type(value) is type(choice) for choice in allowed):
            raise ConfigError(f"{self.path}.{name} must be {' or '.join(map(repr, allowed))}, got {value!r}")


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


def _mixers(cells: list[_Section], width: int) -> tuple[dict[str, dict[str, int]], int]:
    """For each kind of mixer the fields of its config other than rope; and the number of heads."""
    mixers, num_heads = {}, None
    for cell in cells:
        kind, mixer, cell_heads = _mixer(cell, width)
        if mixers.setdefault(kind, mixer) != mixer:
            raise ConfigError(f"{cell.path} differs from the other {kind!r} cell; a model here has one setting a kind")
        if cell_heads is not None and num_heads not in (None, cell_heads):
            raise ConfigError(f"{cell.path}.num_head must be that of the other cell, {num_heads}, got {cell_heads}")
        num_heads = cell_heads if num_heads is None else num_heads
    if num_heads is None:
        num_heads = width // _HEAD_DIM if width % _HEAD_DIM == 0 else 1
    return mixers, num_heads


def _mixer(cell: _Section, width: int) -> tuple[str, dict[str, int], int | None]:
    cell.expect("_name_", "attention", "local_attention", "rnn", "rat")
    kind = cell.text("_name_")
    cell.expect("d_model", width)
    cell.expect("bias", False)
    cell.expect("ln", "rmsnorm")
    common = ("_name_", "d_model", "bias", "ln", "init")
    if kind == "rnn":
        cell.only(*common, "seq_len")
        return kind, {"max_timescale": cell.integer("seq_len")}, None
    common = (*common, "d_head", "num_head", "k_channel")
    head_dim, num_heads = cell.integer("d_head"), cell.integer("num_head")
    if head_dim * num_heads != width:
        raise ConfigError(f"{cell.path}: d_head {head_dim} times num_head {num_heads} must be d_model {width}")
    cell.expect("k_channel", head_dim)
    match kind:
        case "attention":
            cell.only(*common)
            return kind, {}, num_heads
        case "local_attention":
            cell.only(*common, "window_size")
            return kind, {"window": cell.integer("window_size", least=0)}, num_heads
        case "rat":
            cell.only(*common, "ngroups", "chunk_size")
            mixer = {"chunk_size": cell.integer("chunk_size"), "num_groups": cell.integer("ngroups")}
            return kind, mixer, num_heads


def _mlp_width(cell: _Section, width: int) -> int:
    cell.only("_name_", "d_model", "ln", "init", "d_ffn", "act_fn", "bias", "dropout")
    cell.expect("_name_", "ffn")
    cell.expect("d_model", width)
    cell.expect("bias", False)
    cell.expect("ln", "rmsnorm")
    cell.expect("act_fn", "gelu")
    return cell.integer("d_ffn")


def _position_name(kinds: set[str]) -> str:
    """The release's name of the rotations that these kinds of mixers need: by token, by chunk, both or none."""
    match bool(kinds & {"attention", "local_attention"}), "rat" in kinds:
        case True, True:
            return "rope_interrope"
        case True, False:
            return "rope"
        case False, True:
            return "interrope"
        case _:
            return "empty"


def _positions(pe: _Section, mixers: Mapping[str, Mapping[str, int]], head_dim: int) -> tuple[bool, float]:
    """Whether the mixers rotate by position, and the base of the rotation."""
    pe.expect("_name_", *dict.fromkeys((_position_name(set(mixers)), "empty")))
    if pe.text("_name_") == "empty":
        pe.only("_name_")
        return False, float(_ROPE_BASE)
    pe.only("_name_", "dim", "base", "max_seq_len", "max_num_chunk", "chunk_size")
    pe.expect("dim", head_dim)
    if "rat" in mixers:
        pe.expect("chunk_size", mixers["rat"]["chunk_size"])
    base = pe.get("base")
    if not isinstance(base, (int, float)) or isinstance(base, bool):
        raise ConfigError(f"{pe.path}.base must be a number, got {base!r}")
    return True, float(base)
