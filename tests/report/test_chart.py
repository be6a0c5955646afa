"""Charts: points lie where the axes say, whatever the numbers are."""

import math
import re

import pytest

from rat_jax.report.chart import Chart, Curve, draw, marker, thinned


def chart(points, **settings):
    return Chart("title", "x", "y", (Curve(0, "run", points),), **settings)


def places(path):
    return [tuple(map(float, place.split(","))) for place in re.findall(r"[-\d.]+,[-\d.]+", path)]


def value_at(place, ticks, to_axis=float):
    """What the axis says of a place, by two of its ticks."""
    (a, b) = (ticks[0], ticks[-1])
    low, high = (to_axis(float(tick.label.replace(",", ""))) for tick in (a, b))
    return low + (place - a.place) / (b.place - a.place) * (high - low)


def test_points_are_where_the_axes_say():
    points = [(0.0, 1.0), (40.0, 2.5), (100.0, 1.5)]
    drawing = draw(chart(points))
    assert [tick.label for tick in drawing.x_ticks] == ["0", "20", "40", "60", "80", "100"]
    assert [tick.label for tick in drawing.y_ticks] == ["1.0", "1.5", "2.0", "2.5"]
    found = [(value_at(x, drawing.x_ticks), value_at(y, drawing.y_ticks)) for x, y in places(drawing.lines[0].path)]
    for (x, y), (expected_x, expected_y) in zip(found, points, strict=True):
        assert abs(x - expected_x) < 0.02 and abs(y - expected_y) < 0.001
    assert drawing.lines[0].markers.count(marker(0)) == 3


def test_a_logarithmic_axis():
    drawing = draw(chart([(2.0, 1.0), (16.0, 2.0), (1024.0, 3.0)], log_x=True))
    assert [tick.label for tick in drawing.x_ticks] == ["2", "8", "32", "128", "512"]
    (_, (x, _), _) = places(drawing.lines[0].path)
    assert abs(value_at(x, drawing.x_ticks, math.log2) - 4) < 0.01


def test_an_axis_that_is_cut():
    points = [(float(x), 100.0 if x < 10 else 3.0 - x / 100) for x in range(101)]
    whole, cut = draw(chart(points)), draw(chart(points, cut=True))
    assert float(whole.y_ticks[-1].label) == 100
    assert [tick.label for tick in cut.y_ticks] == ["2.0", "2.2", "2.4", "2.6", "2.8"]
    above, *_, last = places(cut.lines[0].path)
    assert above[1] < cut.top and cut.top < last[1] < cut.bottom


def test_many_points_become_means():
    points = thinned([(float(i), float(i % 2)) for i in range(1200)])
    assert len(points) == 400
    assert points[0] == (1.0, 1 / 3) and points[1] == (4.0, 2 / 3)
    assert thinned([(1.0, 2.0)]) == [(1.0, 2.0)]
    assert draw(chart([(float(i), 0.5) for i in range(1200)])).lines[0].markers == ""


@pytest.mark.parametrize(
    "points",
    [
        [(1.0, 2.0)],
        [(0.0, 0.0)],
        [(5.0, 7.0), (5.0, 7.0)],
        [(1.0, 1e29), (2.0, -1e29)],
        [(1.0, 1e-300), (2.0, 2e-300)],
        [(1.0, 1.0), (2.0, 1.0 + 1e-15)],
        [(2.0**53, 1.0), (2.0**53 + 2, 2.0)],
    ],
    ids=lambda points: repr(points),
)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_any_numbers_can_be_drawn(points, cut):
    drawing = draw(chart(points, cut=cut))
    for x, y in places(drawing.lines[0].path):
        assert math.isfinite(x) and math.isfinite(y)
    assert len(drawing.x_ticks) <= 8 and len(drawing.y_ticks) <= 8
