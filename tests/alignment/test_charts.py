"""Charts: what is drawn lies where its axis says."""

import math
import re

import pytest

from alignment.report.charts import Line, area_chart, average, line_chart, thin, ticks


def test_ticks_are_round_and_inside():
    assert ticks(0, 1, 4) == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ticks(0.52, 0.81, 4) == pytest.approx([0.6, 0.7, 0.8])
    assert ticks(1, 24, 5) == [5, 10, 15, 20]


def test_thin_keeps_spikes_and_order():
    points = [(i, 50.0 if i == 333 else float(i % 2)) for i in range(1001)]
    short = thin(points, 100)
    assert len(short) <= 100
    assert (333, 50.0) in short
    assert short[-1] == points[-1]
    assert short == sorted(short)
    assert thin([(1, 2.0), (2, None), (3, math.nan)]) == [(1, 2.0)]


def test_average_keeps_sums():
    points = [(i, float(i % 2)) for i in range(1000)]
    short = average(points, 100)
    assert len(short) == 100
    assert all(y == 0.5 for _, y in short)


def test_many_ordered_layers():
    drawn = area_chart("t", [Line(f"step {i}", [(1, 0.1), (2, 0.1)]) for i in range(20)], ramp=True)
    assert drawn.count("<polygon") == len(set(re.findall(r"<polygon style=\"(.*?)\"", drawn))) == 20
    assert drawn.count("<span><i") == 10


def test_line_lands_where_its_axis_says():
    svg = line_chart("t", [Line("a", [(0, 0.0), (10, 1.0)])], zero=True)
    (points,) = re.findall(r'<polyline class="line c0" points="([^"]+)"', svg)
    marks = dict(re.findall(r'class="y" x="[\d.]+" y="([\d.]+)">([\d.]+)<', svg))
    at_zero = next(float(y) for y, label in marks.items() if label == "0") - 3.5
    at_one = next(float(y) for y, label in marks.items() if float(label) == 1) - 3.5
    first, last = [float(point.split(",")[1]) for point in points.split()]
    assert first == pytest.approx(at_zero, abs=0.1)
    assert last == pytest.approx(at_one, abs=0.1)


@pytest.mark.parametrize("points", [[(1, 0.0)], [(1, 5.0), (2, 5.0)], [(1, 1e-9), (2, 3e-9)], [(1, -1e6), (2, 1e6)]])
def test_charts_of_odd_ranges(points):
    drawn = line_chart("t", [Line("a", points)]) + area_chart("t", [Line("a", [(x, abs(y)) for x, y in points])])
    assert "nan" not in drawn
    assert drawn.count("<svg") == 2
    assert line_chart("t", [Line("a", [])]) == area_chart("t", []) == ""


def test_peak_is_marked_where_its_value_is():
    points = [(0, 0.0), (5, 1.0), (10, 0.5)]
    svg = line_chart("t", [Line("a", points, dots=True), Line("b", points)], note="words", peak=points[1])
    (ring,) = re.findall(r'<circle class="peak" (cx="[\d.]+" cy="[\d.]+") r="6"><title>peak at iteration 5: 1.00<', svg)
    assert ring in re.findall(r'<circle class="c0" (cx="[\d.]+" cy="[\d.]+")', svg)
    assert "<small>words, peak at 5</small>" in svg
    assert "peak" not in line_chart("t", [Line("a", points)])
