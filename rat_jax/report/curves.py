"""Which curves of the runs are drawn: losses while training, and losses by position."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rat_jax.data.corpus import Split
from rat_jax.data.pipeline import describe_coverage
from rat_jax.report.chart import Chart, Curve, Point
from rat_jax.report.measurements import MeasuredLoss
from rat_jax.report.run import Run

_NATS, _BITS = "loss, nats a token", "loss, bits a byte"

Measure = Callable[[Run, Split, float], float | None]


class _Axis(NamedTuple):
    """What the x axis of a training curve counts."""

    name: str
    label: str
    per_step: Callable[[Run], float | None]


_STEPS = _Axis("step", "optimizer step", lambda run: 1.0)
_TOKENS = _Axis("tokens", "tokens read", lambda run: run.tokens_per_step)
_BYTES = _Axis("bytes of text", "bytes of text read", lambda run: run.bytes_per_step)


def several_tokenizers(runs: Sequence[Run]) -> bool:
    """Whether nats a token of these runs are of different tokens, or may be."""
    return len({run.tokenizer_key for run in runs}) > 1


def loss_charts(runs: Sequence[Run]) -> list[Chart]:
    """Training and validation losses by step and by what was read.

    Runs of several tokenizers share axes of bits a byte, as far as their corpora are there, and those of each tokenizer
    axes of nats a token.
    """
    charts = []
    if several_tokenizers(runs):
        charts += _pair(
            runs, range(len(runs)), "", _BITS, lambda run, split, loss: run.bits_per_byte(split, loss), _BYTES
        )
    for key in dict.fromkeys(run.tokenizer_key for run in runs):
        members = [index for index, run in enumerate(runs) if run.tokenizer_key == key]
        of = ""
        if several_tokenizers(runs):
            of = f", tokenizer {runs[members[0]].tokenizer_name}"
        charts += _pair(runs, members, of, _NATS, lambda run, split, loss: loss, _TOKENS)
    return charts


def _pair(
    runs: Sequence[Run], members: Sequence[int], of: str, y_label: str, measure: Measure, amount: _Axis
) -> list[Chart]:
    charts = []
    for axis in (_STEPS, amount):
        curves = [curve for index in members for curve in _training_curves(runs[index], index, measure, axis)]
        if curves:
            title = f"Loss by {axis.name}{of}"
            charts.append(Chart(title, axis.label, y_label, tuple(curves), cut=True))
    return charts


def _training_curves(run: Run, index: int, measure: Measure, axis: _Axis) -> list[Curve]:
    per_step = axis.per_step(run)
    if per_step is None:
        return []
    curves = []
    for split, names, style in (
        ("train", ("mean_loss", "loss"), "thin"),
        ("validation", ("validation_loss",), "marked"),
    ):
        measured = [(step * per_step, measure(run, split, loss)) for step, loss in run.figures(*names)]
        points = [(x, y) for x, y in measured if y is not None]
        what = "training" if split == "train" else "validation"
        if points:
            curves.append(Curve(index, f"{run.label}, {what}", points, style))
    return curves


def position_charts(runs: Sequence[Run]) -> list[Chart]:
    """Losses by position of each run's newest evaluation, a chart for each data, part of them and context length.

    Runs of several tokenizers share one chart of bits a byte by bytes before a token, each with its longest context.
    """
    newest = [(index, run, loss) for index, run in enumerate(runs) for loss in newest_losses(run)]
    if not several_tokenizers(runs):
        groups: dict[tuple, list[tuple[int, Run, MeasuredLoss]]] = {}
        for index, run, loss in newest:
            key = (loss.data_hash, loss.figures.split_fraction, loss.figures.context_length)
            groups.setdefault(key, []).append((index, run, loss))
        several_data = len({loss.data_hash for _, _, loss in newest}) > 1
        return [chart for key in groups if (chart := _position_chart(groups[key], several_data)) is not None]
    longest: dict[int, tuple[int, Run, MeasuredLoss]] = {}
    for index, run, loss in newest:
        if loss.figures.bits_per_byte is not None and loss.figures.loss > 0:
            before = longest.get(index)
            if before is None or before[2].figures.context_length < loss.figures.context_length:
                longest[index] = (index, run, loss)
    curves = [_in_bytes(*member) for member in longest.values()]
    curves = [curve for curve in curves if curve.points]
    title = "Loss by position in bytes, longest context of each run"
    return [Chart(title, "bytes of text before a token, about", _BITS, tuple(curves), log_x=True)] if curves else []


def newest_losses(run: Run) -> list[MeasuredLoss]:
    """Of each measurement the one of the latest step."""
    newest: dict[tuple, MeasuredLoss] = {}
    for loss in sorted(run.measurements.losses, key=lambda loss: loss.step):
        newest[loss.data_hash, loss.figures.split_fraction, loss.figures.context_length] = loss
    return sorted(newest.values(), key=lambda loss: (loss.data_path, loss.data_hash, loss.figures.context_length))


def _position_chart(members: Sequence[tuple[int, Run, MeasuredLoss]], several_data: bool) -> Chart | None:
    curves = []
    for index, run, loss in members:
        if points := _points(loss):
            curves.append(Curve(index, f"{run.label}, step {loss.step:,}", points))
    loss = members[0][2]
    of = f" of {loss.data_path}" if several_data else ""
    title = (
        f"Loss by position, context {loss.figures.context_length:,}, on "
        f"{describe_coverage(loss.figures.split_fraction)}{of}"
    )
    return Chart(title, "position in the context, tokens", _NATS, tuple(curves), log_x=True) if curves else None


def _points(loss: MeasuredLoss) -> list[Point]:
    return [(bucket.middle, bucket.loss) for bucket in loss.buckets if bucket.loss is not None]


def _in_bytes(index: int, run: Run, loss: MeasuredLoss) -> Curve:
    """Both axes by the bytes that a target of the split has on average."""
    bytes_per_target = loss.figures.loss / loss.figures.nats_per_byte
    bits_per_nat = loss.figures.bits_per_byte / loss.figures.loss
    points = [(x * bytes_per_target, y * bits_per_nat) for x, y in _points(loss)]
    label = f"{run.label}, step {loss.step:,}, context {loss.figures.context_length:,} tokens"
    return Curve(index, label, points)
