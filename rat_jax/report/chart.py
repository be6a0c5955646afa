"""Curves on axes, drawn as paths of SVG: all geometry is here, all markup in the template."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

from rat_jax.report import amounts

WIDTH, HEIGHT = 400, 280  # of the view box; a phone shows about as many pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 14, 10, 42
_MAX_POINTS = 400  # of a drawn curve
_MAX_MARKERS = 40
_NUM_TICKS = 6

# Around a point; a run keeps its own, so that colour is not all that tells curves apart.
_MARKERS = (
    "m-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0",  # circle
    "m-2.8,-2.8h5.6v5.6h-5.6z",  # square
    "m0,-3.6l3.5,6.2h-7z",  # triangle
    "m0,-4l4,4l-4,4l-4,-4z",  # diamond
    "m0,3.6l3.5,-6.2h-7z",  # triangle on its head
)
NUM_COLOURS = 6  # with five markers, the first thirty runs all differ

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points of a run, by x."""

    run: int  # whose colour and marker it has
    label: str
    points: Sequence[Point]
    style: Literal["thin", "marked"] = "marked"


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves that share axes."""

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    log_x: bool = False
    cut: bool = False  # the y axis ends where the curves are after a tenth of the x axis
    mark: float | None = None  # on the x axis, a dashed line

    @property
    def summary(self) -> str:
        """For those who do not see it: where each curve begins and ends."""
        parts = []
        for curve in self.curves:
            (x0, y0), (x1, y1) = curve.points[0], curve.points[-1]
            parts.append(f"{curve.label}: {y0:.4g} at {amounts.axis(x0)}, {y1:.4g} at {amounts.axis(x1)}")
        return "; ".join(parts)


class Tick(NamedTuple):
    """A labelled place on an axis."""

    place: float
    label: str


class Line(NamedTuple):
    """A drawn curve."""

    run: int
    style: str
    path: str
    markers: str


@dataclasses.dataclass(frozen=True)
class Drawing:
    """A chart in the units of its view box."""

    chart: Chart
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    mark: float | None
    left: float = _LEFT
    right: float = WIDTH - _RIGHT
    top: float = _TOP
    bottom: float = HEIGHT - _BOTTOM


def marker(run: int) -> str:
    """The path of a run's marker around where the pen is."""
    return _MARKERS[run % len(_MARKERS)]


def draw(chart: Chart) -> Drawing:
    """Axes that hold all curves, of which each has a point at least."""
    curves = [thinned(curve.points) for curve in chart.curves]
    points = list(itertools.chain.from_iterable(curves))
    to_axis = math.log2 if chart.log_x else float
    x_low, x_high = _range([to_axis(x) for x, _ in points], 0.0)
    y_low, y_high = _range(_heights(chart, points), 0.05)

    def x_place(x: float) -> float:
        return _LEFT + (to_axis(x) - x_low) / (x_high - x_low) * (WIDTH - _LEFT - _RIGHT)

    mark = chart.mark if chart.mark is not None and x_low <= to_axis(chart.mark) <= x_high else None
    drawing = Drawing(chart, [], [], [], mark if mark is None else x_place(mark))

    def y_place(y: float) -> float:
        share = min(max((y - y_low) / (y_high - y_low), -2.0), 3.0)  # what is far outside is not seen
        return drawing.bottom - share * (drawing.bottom - drawing.top)

    x_ticks = _powers_of_two(x_low, x_high) if chart.log_x else _round_numbers(x_low, x_high)
    drawing.x_ticks.extend(Tick(x_place(x), amounts.axis(x)) for x in x_ticks)
    y_ticks = _round_numbers(y_low, y_high)
    digits = max(0, -math.floor(math.log10(y_ticks[1] - y_ticks[0]))) if len(y_ticks) > 1 else 2
    drawing.y_ticks.extend(Tick(y_place(y), f"{y:,.{digits}f}" if abs(y) < 1e6 else f"{y:.3g}") for y in y_ticks)
    for curve, kept in zip(chart.curves, curves, strict=True):
        places = [f"{x_place(x):.1f},{y_place(y):.1f}" for x, y in kept]
        is_marked = curve.style == "marked" and len(places) <= _MAX_MARKERS
        markers = "".join(f"M{place}{marker(curve.run)}" for place in places) if is_marked else ""
        drawing.lines.append(Line(curve.run, curve.style, "M" + "L".join(places), markers))
    return drawing


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most `_MAX_POINTS` points: the means of neighbours where there are more."""
    size = -(-len(points) // _MAX_POINTS)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts]


def _heights(chart: Chart, points: Sequence[Point]) -> list[float]:
    """The y values that the axis must hold."""
    if not chart.cut:
        return [y for _, y in points]
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    return [y for x, y in points if x >= first + (last - first) / 10]


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        low, high = low - (abs(low) or 1.0) / 10, high + (abs(high) or 1.0) / 10
    return low - margin * (high - low), high + margin * (high - low)


def _round_numbers(low: float, high: float) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    exact = (high - low) / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(exact))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= exact * 0.999)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _powers_of_two(low: float, high: float) -> list[float]:
    """Every so many powers; `low` and `high` are logarithms."""
    first, last = math.ceil(low - 1e-9), math.floor(high + 1e-9)
    stride = max(1, -(-(last - first) // 7))
    return [2.0**power for power in range(first, last + 1, stride)]
