"""Losses beyond the training length as a table and as a picture, of one run or of several."""

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from rat_jax.data import DataError
from rat_jax.data.json_object import LARGEST, build, build_known, require
from rat_jax.data.pipeline import describe_coverage
from rat_jax.errors import shown
from rat_jax.evaluation.errors import EvaluationError
from rat_jax.evaluation.position_sums import Bucket
from rat_jax.evaluation.results import LENGTHS_PREFIX
from rat_jax.files import ContentError, read_object
from rat_jax.pictures import write_picture

Results = dict[str, Any]  # of `rat_jax.evaluation.results.lengths_as_json`
_AGAIN = "python eval.py --workdir={} --length_generalization=8"


@dataclasses.dataclass(frozen=True)
class _Figures:
    """What of the results is shown."""

    run: str
    step: int
    trained_length: int
    context_length: int
    positions: str
    split_fraction: float
    cache_bytes: Mapping[str, Any]
    loss_within: float | None
    loss_by_octave: list[Any]
    loss_by_position: list[Any]


@dataclasses.dataclass(frozen=True)
class _CacheBytes:
    trained_length: int
    context_length: int


def find_results(path: pathlib.Path) -> Results:
    """What `eval.py --length_generalization` wrote: a file, or that of a workdir's last step and longest context.

    Raises:
      EvaluationError: if there is none or there are several, or if figures are missing; the message names the files.
      FileError: if a file cannot be read.
    """
    if not path.is_dir():
        return _read(path, "name what eval.py --length_generalization wrote")
    again = f"delete it and measure again: {_AGAIN.format(path)}"
    found = [(_read(file, again), file) for file in sorted(path.glob(f"{LENGTHS_PREFIX}-*.json"))]
    if not found:
        raise EvaluationError(f"{path} has no {LENGTHS_PREFIX}-*.json: run `{_AGAIN.format(path)}`")

    def order(results: Results) -> tuple[int, int]:
        return results["step"], results["context_length"]

    last = max(order(results) for results, _ in found)
    chosen = [(results, file) for results, file in found if order(results) == last]
    if len(chosen) > 1:
        raise EvaluationError(f"{path} has several of its last step, name one: {', '.join(str(f) for _, f in chosen)}")
    return chosen[0][0]


def _read(file: pathlib.Path, advice: str) -> Results:
    try:
        results = read_object(file)
        if "loss_by_octave" not in results:
            raise EvaluationError(f"{file} holds no loss_by_octave: name what eval.py --length_generalization wrote")
        _check(results, str(file))
    except FileNotFoundError:
        raise EvaluationError(f"there is neither a workdir nor a file {file}") from None
    except (ContentError, DataError) as error:
        raise EvaluationError(f"{error}; {advice}") from None
    return results


def _check(results: Results, name: str) -> None:
    figures = build_known(_Figures, results, name)
    sizes = build(_CacheBytes, figures.cache_bytes, f"{name}, cache_bytes,")
    for what, count, least in (
        ("step", figures.step, 0),
        ("trained_length", figures.trained_length, 1),
        ("context_length", figures.context_length, 1),
        ("cache_bytes", min(dataclasses.astuple(sizes)), 0),
        ("cache_bytes", max(dataclasses.astuple(sizes)), 0),
    ):
        require(least <= count < LARGEST, name, f"{what} is {shown(count)}")
    for field in ("loss_by_octave", "loss_by_position"):
        for values in getattr(figures, field):
            bucket = build(Bucket, values, f"{name}, {field},")
            require(0 <= bucket.first <= bucket.last < LARGEST, name, f"{field} has no such positions: {shown(bucket)}")


def table(results: Results) -> str:
    """Text: what was measured, and a line for each octave of positions."""
    trained, context = results["trained_length"], results["context_length"]
    sizes = [results["cache_bytes"][name] / 2**10 for name in ("trained_length", "context_length")]
    lines = [
        f"loss on {describe_coverage(results['split_fraction'])}, in sequences of {context:,} tokens",
        f"trained on {trained:,} tokens; positions are counted from the start of a {results['positions']}",
        f"cache of a row: {sizes[0]:,.1f} KiB at {trained:,} tokens, {sizes[1]:,.1f} KiB at {context:,}",
        f"{'positions':>18} {'x training':>15} {'tokens':>13} {'loss':>8}",
    ]
    for bucket in results["loss_by_octave"]:
        first, end = bucket["first"], bucket["last"] + 1
        loss = "-" if bucket["loss"] is None else f"{bucket['loss']:.4f}"
        lines.append(
            f"{first:>8} ..{bucket['last']:>8} {first / trained:>6.3g} ..{end / trained:>6.3g} "
            f"{round(bucket['num_targets']):>13,} {loss:>8}"
        )
    return "\n".join(lines)


def markdown_table(runs: Sequence[Results]) -> str:
    """A line for each run, a column for each octave from the training length on, one for all positions below it.

    Raises:
      EvaluationError: if runs were trained on different lengths.
    """
    lengths = {run["trained_length"] for run in runs}
    if len(lengths) > 1:
        raise EvaluationError(
            f"one table is of one training length, these runs have {', '.join(map(str, sorted(lengths)))}: give the "
            f"runs of each by themselves"
        )
    (trained,) = lengths
    longest = max(runs, key=lambda run: run["context_length"])
    beyond = [bucket for bucket in longest["loss_by_octave"] if bucket["first"] >= trained]
    heads = [f"below {trained}", *(f"{bucket['first']} to {bucket['last']}" for bucket in beyond)]
    lines = [
        f"| run | {' | '.join(heads)} | KiB of cache at {trained} | at the longest |",
        "|---" * (len(heads) + 3) + "|",
    ]
    for run in runs:
        losses = {bucket["first"]: bucket["loss"] for bucket in run["loss_by_octave"]}
        cells = [run["loss_within"], *(losses.get(bucket["first"]) for bucket in beyond)]
        sizes = [run["cache_bytes"][name] / 2**10 for name in ("trained_length", "context_length")]
        words = [
            *("" if loss is None else f"{loss:.3f}" for loss in cells),
            *(f"{size:,.1f}" for size in sizes),
        ]
        lines.append(f"| {run['run']} | {' | '.join(words)} |")
    return "\n".join(lines)


def plot(runs: Sequence[Results], path: pathlib.Path) -> None:
    """Draws loss against position, a curve for each run; lines mark the lengths of training sequences.

    Raises:
      FileError: if the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run in runs:
        buckets = [Bucket(**bucket) for bucket in run["loss_by_position"] if bucket["loss"] is not None]
        middles = [bucket.middle for bucket in buckets]
        axes.plot(middles, [bucket.loss for bucket in buckets], "o-", markersize=3, label=run["run"])
    for length in sorted({run["trained_length"] for run in runs}):
        axes.axvline(length, color="gray", linestyle="--", linewidth=1, label=f"trained on {length} tokens")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.set_xlabel(f"position, tokens from the start of a {' or '.join(sorted({run['positions'] for run in runs}))}")
    axes.set_ylabel("loss, nats a token")
    axes.grid(alpha=0.3)
    axes.legend()
    write_picture(figure, path)
