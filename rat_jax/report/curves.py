"""Which curves of the runs are drawn: losses while training, and losses by position."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rat_jax.data.corpus import Split
from rat_jax.data.pipeline import describe_coverage
from rat_jax.report.chart import Chart, Curve, Point
from rat_jax.report.measurements import LengthFigures, MeasuredLoss
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
    for key, of in _of_tokenizers(runs).items():
        members = [index for index, run in enumerate(runs) if run.tokenizer_key == key]
        charts += _pair(runs, members, of, _NATS, lambda run, split, loss: loss, _TOKENS)
    return charts


def _of_tokenizers(runs: Sequence[Run]) -> dict[str | None, str]:
    """What titles say of each tokenizer: nothing if there is one."""
    firsts: dict[str | None, Run] = {}
    for run in runs:
        firsts.setdefault(run.tokenizer_key, run)
    if len(firsts) == 1:
        return dict.fromkeys(firsts, "")
    names = [run.tokenizer_name for run in firsts.values()]
    return {
        key: f", tokenizer {run.tokenizer_name}" + (f", of {run.label}" if names.count(run.tokenizer_name) > 1 else "")
        for key, run in firsts.items()
    }


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
        *(("validation", (name,), "marked") for name in run.validation_losses),
    ):
        measured = [(step * per_step, measure(run, split, loss)) for step, loss in run.figures(*names)]
        points = [(x, y) for x, y in measured if y is not None]
        corpus = names[0].partition("/")[2]
        what = "training" if split == "train" else "validation" + f" of {corpus}" * bool(corpus)
        if points:
            curves.append(Curve(index, f"{run.label}, {what}", points, style))
    return curves


def position_charts(runs: Sequence[Run]) -> list[Chart]:
    """Losses by position of each run's newest evaluation, a chart for each data, part of them and context length.

    Runs of several tokenizers share one chart of bits a byte by bytes before a token, each with its longest context.
    """
    newest = [_Member(index, run, loss) for index, run in enumerate(runs) for loss in newest_losses(run)]
    if not several_tokenizers(runs):
        several_data = len({member.loss.data_hash for member in newest}) > 1
        charts = (_position_chart(members, several_data) for members in _grouped(newest))
        return [chart for chart in charts if chart is not None]
    longest: dict[int, _Member] = {}
    for member in newest:
        figures = member.loss.figures
        if figures.bits_per_byte is not None and figures.loss > 0:
            before = longest.get(member.index)
            if before is None or before.loss.figures.context_length < figures.context_length:
                longest[member.index] = member
    curves = [_in_bytes(member) for member in longest.values()]
    curves = [curve for curve in curves if curve.points]
    title = "Loss by position in bytes, longest context of each run"
    return [Chart(title, "bytes of text before a token, about", _BITS, tuple(curves), log_x=True)] if curves else []


def length_charts(runs: Sequence[Run]) -> list[Chart]:
    """Losses by position beyond the training length, a chart for each tokenizer, data, part of them and length."""
    newest = [_Member(index, run, loss) for index, run in enumerate(runs) for loss in newest_lengths(run)]
    several_data, of = len({member.loss.data_hash for member in newest}) > 1, _of_tokenizers(runs)
    charts = (
        _position_chart(members, several_data, " beyond the training length", of[members[0].run.tokenizer_key])
        for members in _grouped(newest)
    )
    return [chart for chart in charts if chart is not None]


def newest_losses(run: Run) -> list[MeasuredLoss]:
    """Of each measurement of a context length the one of the latest step."""
    return _newest(run.measurements.losses)


def newest_lengths(run: Run) -> list[MeasuredLoss]:
    """Of each measurement beyond the training length the one of the latest step."""
    return _newest(run.measurements.lengths)


class _Member(NamedTuple):
    """A loss of a run, of those that share axes."""

    index: int
    run: Run
    loss: MeasuredLoss


def _newest(losses: Sequence[MeasuredLoss]) -> list[MeasuredLoss]:
    newest = {_what(loss): loss for loss in sorted(losses, key=lambda loss: loss.step)}
    return sorted(newest.values(), key=lambda loss: (loss.data_path, loss.data_hash, loss.figures.context_length))


def _what(loss: MeasuredLoss) -> tuple:
    """What was measured, whatever the model."""
    figures = loss.figures
    positions = figures.positions if isinstance(figures, LengthFigures) else ""
    return loss.data_hash, figures.split_fraction, figures.context_length, positions


def _grouped(members: Sequence[_Member]) -> list[list[_Member]]:
    groups: dict[tuple, list[_Member]] = {}
    for member in members:
        groups.setdefault((member.run.tokenizer_key, *_what(member.loss)), []).append(member)
    return list(groups.values())


def _position_chart(
    members: Sequence[_Member], several_data: bool, beyond: str = "", of_tokenizer: str = ""
) -> Chart | None:
    curves = []
    for index, run, loss in members:
        if points := _points(loss):
            curves.append(Curve(index, f"{run.label}, step {loss.step:,}", points))
    loss = members[0].loss
    of = f" of {loss.data_path}, {loss.data_hash[:8]}" if several_data else ""
    title = (
        f"Loss by position{beyond}, context {loss.figures.context_length:,}, on "
        f"{describe_coverage(loss.figures.split_fraction)}{of}{of_tokenizer}"
    )
    positions, mark = "context", None
    if isinstance(loss.figures, LengthFigures):
        positions = loss.figures.positions
        trained = {member.loss.figures.trained_length for member in members}
        mark = float(trained.pop()) if len(trained) == 1 else None
    x_label = f"position in the {positions}, tokens"
    return Chart(title, x_label, _NATS, tuple(curves), log_x=True, mark=mark) if curves else None


def _points(loss: MeasuredLoss) -> list[Point]:
    return [(bucket.middle, bucket.loss) for bucket in loss.buckets if bucket.loss is not None]


def _in_bytes(member: _Member) -> Curve:
    """Both axes by the bytes that a target of the split has on average."""
    index, run, loss = member
    bytes_per_target = loss.figures.loss / loss.figures.nats_per_byte
    bits_per_nat = loss.figures.bits_per_byte / loss.figures.loss
    points = [(x * bytes_per_target, y * bits_per_nat) for x, y in _points(loss)]
    label = f"{run.label}, step {loss.step:,}, context {loss.figures.context_length:,} tokens"
    return Curve(index, label, points)
