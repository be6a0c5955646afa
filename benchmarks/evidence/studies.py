"""Which models are compared: kinds, each trained with several seeds, in studies that each ask one question."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

_HYBRID = ("attention", "rattention", "rattention", "rattention")  # arXiv 2506.15545: windows in three layers of four
_WINDOWS = ("attention", "local_attention", "local_attention", "local_attention")
_NO_POSITIONS = {"rope": False}
_WITHOUT_ROPE = {kind: _NO_POSITIONS for kind in ("attention", "local_attention", "rat")}
_GLOBAL_WITHOUT_ROPE = {kind: _NO_POSITIONS for kind in ("attention", "rat")}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A model of a study. What is not said here stands in `train_config.py` and is the same for all."""

    pattern: tuple[str, ...]
    mlp_width: int = 1536  # such that all kinds have as many parameters, within 2 %
    mixers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # settings by mixer
    qk_norm: bool = False  # queries and keys of attention, windows and RAttention are normalised


def _rattention(window: int, qk_norm: bool = False, **settings: Any) -> Kind:
    """As in the paper, attention over all tokens has no positions, and windows have."""
    mixers = {"attention": _NO_POSITIONS, "rattention": {"window": window, **settings}}
    return Kind(_HYBRID, mixers=mixers, qk_norm=qk_norm)


def _windows(window: int, qk_norm: bool = False) -> Kind:
    """`_rattention` without its linear branch."""
    mixers = {"attention": _NO_POSITIONS, "local_attention": {"window": window}}
    return Kind(_WINDOWS, mixers=mixers, qk_norm=qk_norm)


def _rat(chunk_size: int) -> Kind:
    return Kind(("rat",), 1408, {"rat": {"chunk_size": chunk_size}})


_ATTENTION_SWA, _RAT_SWA = ("attention", "local_attention"), ("rat", "local_attention")

KINDS: dict[str, Kind] = {
    "attention": Kind(("attention",)),
    "rnn": Kind(("rnn",)),
    "rat": _rat(16),
    "attention_swa": Kind(_ATTENTION_SWA),
    "rat_swa": Kind(_RAT_SWA, 1472),
    "rattention": _rattention(256),
    "gated_deltanet": Kind(("gated_deltanet",), 1152),
    "gated_deltanet_swa": Kind(("gated_deltanet", "local_attention"), 1344),
    **{f"rattention_{window}": _rattention(window) for window in (16, 64, 1024)},
    **{f"windows_{window}": _windows(window) for window in (16, 64, 256, 1024)},
    **{f"rat_{chunk_size}": _rat(chunk_size) for chunk_size in (4, 8, 32, 64, 128)},
    "attention_nope": Kind(("attention",), mixers=_WITHOUT_ROPE),
    "attention_swa_nope": Kind(_ATTENTION_SWA, mixers=_WITHOUT_ROPE),
    "attention_swa_global_nope": Kind(_ATTENTION_SWA, mixers=_GLOBAL_WITHOUT_ROPE),
    "rat_nope": Kind(("rat",), 1408, _WITHOUT_ROPE),
    "rat_swa_nope": Kind(_RAT_SWA, 1472, _WITHOUT_ROPE),
    "rat_swa_global_nope": Kind(_RAT_SWA, 1472, _GLOBAL_WITHOUT_ROPE),
    "attention_qk_norm": Kind(("attention",), qk_norm=True),
    **{f"rattention_{window}_qk_norm": _rattention(window, qk_norm=True) for window in (16, 256)},
    **{f"windows_{window}_qk_norm": _windows(window, qk_norm=True) for window in (16, 256)},
    **{f"rattention_{window}_quiet": _rattention(window, branch_scale=0.1) for window in (16, 256)},
    **{
        f"rattention_{window}_quiet_qk_norm": _rattention(window, qk_norm=True, branch_scale=0.1)
        for window in (16, 256)
    },
}


class Study(NamedTuple):
    """One question."""

    question: str
    kinds: tuple[str, ...]


STUDIES: dict[str, Study] = {
    "mixers": Study(
        "What does each mixer reach at equal parameters and tokens?",
        (
            *("attention", "rnn", "rat", "attention_swa", "rat_swa"),
            *("rattention", "gated_deltanet", "gated_deltanet_swa"),
        ),
    ),
    "windows": Study(
        "What does linear attention beside a window replace of the window?",
        (
            *("rattention_16", "rattention_64", "rattention", "rattention_1024"),
            *("windows_16", "windows_64", "windows_256", "windows_1024", "attention"),
        ),
    ),
    "chunks": Study(
        "What do longer chunks cost RAT?",
        ("rat_4", "rat_8", "rat", "rat_32", "rat_64", "rat_128", "attention", "rnn"),
    ),
    "norms": Study(
        "What do normalised queries and keys, as in RAttention's paper, and branch norms that start at 0.1 change?",
        (
            *("rattention_16_qk_norm", "rattention_256_qk_norm", "windows_16_qk_norm", "windows_256_qk_norm"),
            *("attention_qk_norm", "rattention_16_quiet", "rattention_256_quiet", "rattention_16_quiet_qk_norm"),
            *("rattention_256_quiet_qk_norm", "rattention_16", "rattention", "windows_16", "windows_256", "attention"),
        ),
    ),
    "positions": Study(
        "Which models need no position encoding, and which keep their loss beyond their training length?",
        (
            *("attention", "attention_nope", "attention_swa", "attention_swa_nope", "attention_swa_global_nope"),
            *("rat", "rat_nope", "rat_swa", "rat_swa_nope", "rat_swa_global_nope", "rattention", "rnn"),
        ),
    ),
}


class Model(NamedTuple):
    """One model to train and to measure."""

    kind: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.kind}-{self.seed}"


def models(studies: tuple[str, ...] = tuple(STUDIES), num_seeds: int = 2) -> list[Model]:
    """What is trained, in this order: the first study with all seeds, then the others; a seed of all kinds at a time.

    A kind of several studies is trained once, and its second seed has the first one's compiled programs.
    """
    first, *others = studies
    found = [Model(kind, seed) for seed in range(num_seeds) for kind in STUDIES[first].kinds]
    found += [Model(kind, seed) for seed in range(num_seeds) for study in others for kind in STUDIES[study].kinds]
    return list(dict.fromkeys(found))
