"""The pictures of docs/evidence.md."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.evidence.comparison import Results
from benchmarks.evidence.studies import STUDIES

_FEWEST_STEPS = 4  # a curve's beginning would hide its end: the first quarter is left out


def draw_losses(results: Results) -> Figure:
    """Losses at the training length with two standard errors of seeds, and their curves while training."""
    figure = _figure(12, 4.5)
    points, curves = figure.subplots(1, 2)
    kinds = _known(results, STUDIES["mixers"].kinds)
    for row, kind in enumerate(kinds):
        error, result = results.error(kind), results.by_kind[kind]
        points.errorbar(result.loss(results.length), row, xerr=2 * error if error else None, fmt="o", capsize=3)
        points.plot(result.losses(results.length), [row] * len(result.models), "k|", markersize=10)
        curve = result.curve()
        curve = curve[len(curve) // _FEWEST_STEPS :]
        curves.plot([tokens / 1e6 for tokens, _ in curve], [loss for _, loss in curve], label=kind, color=f"C{row}")
    points.set_yticks(range(len(kinds)), kinds)
    points.invert_yaxis()
    points.set_xlabel(f"validation loss at {results.length:,} tokens, nats a token (| one seed)")
    curves.set_xlabel("training tokens, millions")
    curves.set_ylabel("validation loss, nats a token")
    _legend(curves)
    return figure


def draw_sweeps(results: Results) -> Figure:
    """Losses by window, with and without linear attention, and by chunk."""
    figure = _figure(12, 4)
    windows, chunks = figure.subplots(1, 2)
    for label, names in (
        (
            "windows and linear attention",
            {16: "rattention_16", 64: "rattention_64", 256: "rattention", 1024: "rattention_1024"},
        ),
        ("windows alone", {size: f"windows_{size}" for size in (16, 64, 256, 1024)}),
    ):
        _sweep(windows, results, names, label)
    _sweep(chunks, results, {4: "rat_4", 8: "rat_8", 16: "rat", 32: "rat_32", 64: "rat_64", 128: "rat_128"}, "RAT")
    for axes, what in ((windows, "window, tokens"), (chunks, "chunk, tokens")):
        for kind, style in (("attention", "--"), ("rnn", ":")):
            if kind in results.by_kind:
                axes.axhline(results.by_kind[kind].loss(results.length), color="gray", linestyle=style, label=kind)
        if axes.containers:  # of no result there is no logarithm
            axes.set_xscale("log", base=2)
        axes.set_xlabel(what)
        axes.set_ylabel("validation loss, nats a token")
        _legend(axes)
    return figure


def draw_lengths(results: Results) -> Figure:
    """Losses by position up to eight times the training length."""
    figure = _figure(12, 4.5)
    panels = figure.subplots(1, 2, sharey=True)
    families = (
        ("attention", "attention_swa", "rattention", "rnn"),
        ("rat", "rat_swa", "gated_deltanet", "gated_deltanet_swa"),
    )
    for axes, family in zip(panels, families, strict=True):
        every = [kind for kind in results.by_kind if _family(kind) in family]
        for color, kind in enumerate(every):
            octaves = results.by_kind[kind].by_octave(results.by_kind[kind].lengths[-1])
            places = [max(first, 8) for first, _ in octaves]
            style = "-" if kind in family else "--"
            axes.plot(places, [loss for _, loss in octaves], style, marker=".", label=kind, color=f"C{color}")
        axes.axvline(results.length, color="gray", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("first position of an octave (line: the training length)")
        _legend(axes)
    panels[0].set_ylabel("loss, nats a token")
    return figure


def _family(kind: str) -> str:
    return kind.removesuffix("_global_nope").removesuffix("_nope")


def _known(results: Results, kinds: Sequence[str]) -> list[str]:
    return [kind for kind in kinds if kind in results.by_kind]


def _sweep(axes: Axes, results: Results, names: dict[int, str], label: str) -> None:
    known = {size: name for size, name in names.items() if name in results.by_kind}
    if not known:
        return
    errors = [2 * (results.error(name) or 0.0) for name in known.values()]
    losses = [results.by_kind[name].loss(results.length) for name in known.values()]
    axes.errorbar(list(known), losses, yerr=errors, marker="o", capsize=3, label=label)


def _legend(axes: Axes) -> None:
    if axes.get_legend_handles_labels()[1]:
        axes.legend(fontsize=8)


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
