"""Small line and area charts as inline SVG, for the run report: no script, no font, no library, sharp at any size.

Every chart is an HTML `<figure>`: a caption with the latest value, a legend where there are several lines, the SVG.
Colours and text sizes come from the page's style sheet (page.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from ..gains import finite, number

WIDTH, HEIGHT = 360, 184  # of the drawing, in its own units; the page scales it
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 22  # room around the plot for the axis labels
MAX_POINTS = 240  # longer lines are thinned, so that a long run's page stays small
MAX_DOTS = 30  # more evaluations are drawn as a plain line
MAX_LEGEND = 10  # of more entries only some are named
NUM_COLOURS = 6
Point = tuple[float, float]


class Line(NamedTuple):
    """One line of a chart."""

    name: str
    points: Sequence[Point]  # (iteration, value), by iteration
    dots: bool = False  # mark every point: for the few values of evaluations
    colour: int = -1  # 0 to NUM_COLOURS - 1; -1: by position in the chart


class Band(NamedTuple):
    """A tinted range around a line."""

    low: Sequence[Point]
    high: Sequence[Point]


class _Axes(NamedTuple):
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (value - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)

    def path(self, points: Sequence[Point]) -> str:
        return " ".join(f"{self.x(x):.1f},{self.y(y):.1f}" for x, y in points)


def line_chart(
    title: str,
    lines: Sequence[Line],
    band: Band | None = None,
    note: str = "",
    zero: bool = False,
    level: float = math.nan,
    peak: Point | None = None,
) -> str:
    """A chart of lines over iterations, or "" where no line has a point.

    Args:
        note: a few words behind the title.
        zero: let the value axis start at 0.
        level: a value to mark with a dashed line.
        peak: a point to mark as the best one.
    """
    lines = [_clean(line, i) for i, line in enumerate(lines)]
    lines = [line for line in lines if line.points]
    if not lines:
        return ""
    around = [thin(side) for side in band] if band else []
    values = [y for line in lines for _, y in line.points] + [y for side in around for _, y in side]
    axes = _axes([x for line in lines for x, _ in line.points], values + [level] * finite(level), zero)
    parts = [_grid(axes)]
    if around:
        parts.append(f'<polygon class="band c{lines[0].colour}" points="{axes.path([*around[0], *around[1][::-1]])}"/>')
    if finite(level):
        y = f"{axes.y(level):.1f}"
        parts.append(f'<line class="level" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
    for line in lines:
        parts.append(f'<polyline class="line c{line.colour}" points="{axes.path(line.points)}"/>')
        if len(line.points) == 1 or (line.dots and len(line.points) <= MAX_DOTS):
            parts += [_dot(axes, line, *point) for point in line.points]
    if peak:
        words = f"peak at iteration {peak[0]:g}: {number(peak[1])}"
        x, y = f"{axes.x(peak[0]):.1f}", axes.y(peak[1])
        parts.append(f'<line class="peak" x1="{x}" x2="{x}" y1="{y:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<circle class="peak" cx="{x}" cy="{y:.1f}" r="6"><title>{words}</title></circle>')
        note = ", ".join(filter(None, [note, f"peak at {peak[0]:g}"]))
    latest = number(lines[0].points[-1][1]) if len(lines) == 1 else ""
    legend = [(line.name, line.colour) for line in lines] if len(lines) > 1 else []
    return _figure(title, note, latest, legend, parts)


def area_chart(title: str, lines: Sequence[Line], note: str = "", ramp: bool = False) -> str:
    """Lines stacked upon each other, or "" if there are none.

    Args:
        lines: all at the same iterations, values >= 0.
        ramp: shade the areas from dark to light, for lines that have an order.
    """
    lines = [
        line._replace(points=average(line.points), colour=i % NUM_COLOURS if line.colour < 0 else line.colour)
        for i, line in enumerate(lines)
        if line.points
    ]
    if not lines:
        return ""
    xs = [x for x, _ in lines[0].points]
    base = [0.0] * len(xs)
    layers = []
    for line in lines:
        top = [b + y for b, (_, y) in zip(base, line.points, strict=True)]
        layers.append((base, top))
        base = top
    axes = _axes(xs, base, zero=True)
    if len(xs) == 1:  # an area needs a width
        xs, layers = [axes.x0, axes.x1], [(low * 2, high * 2) for low, high in layers]
    shades = [f"hsl(214 62% {32 + 56 * i / max(len(lines) - 1, 1):.0f}%)" for i in range(len(lines))]
    parts = []
    for line, (low, high), shade in zip(lines, layers, shades, strict=True):
        around = axes.path([*zip(xs, low, strict=True), *list(zip(xs, high, strict=True))[::-1]])
        look = f'style="fill:{shade}"' if ramp else f'class="area c{line.colour}"'
        parts.append(f'<polygon {look} points="{around}"/>')
    entries = [(line.name, shade if ramp else line.colour) for line, shade in zip(lines, shades, strict=True)]
    entries = entries[:: math.ceil(len(entries) / MAX_LEGEND)]
    return _figure(title, note, "", entries, [*parts, _grid(axes)])


def share_bar(shares: Sequence[tuple[str, float, int]]) -> str:
    """One bar divided by shares, with a legend. shares: (label, any positive number, colour)."""
    total = sum(value for _, value, _ in shares)
    blocks = "".join(f'<i class="k{c}" style="width:{100 * value / total:.2f}%"></i>' for _, value, c in shares)
    return f'<div class="bar">{blocks}</div>{_legend([(name, colour) for name, _, colour in shares])}'


def thin(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` of the usable points: of neighbours the lowest and highest, so that spikes stay, and the last."""
    points = [(x, y) for x, y in points if finite(x) and finite(y)]
    if len(points) <= limit:
        return points
    blocks = _blocks(points[:-1], (limit - 1) // 2)
    kept = [point for block in blocks for point in sorted({min(block, key=_value), max(block, key=_value)})]
    return [*kept, points[-1]]


def average(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """At most `limit` points: neighbours are averaged, so that stacked lines still add up."""
    if len(points) <= limit:
        return list(points)
    return [tuple(math.fsum(axis) / len(axis) for axis in zip(*block, strict=True)) for block in _blocks(points, limit)]


def _value(point: Point) -> float:
    return point[1]


def _blocks(points: Sequence[Point], num: int) -> list[Sequence[Point]]:
    size = math.ceil(len(points) / num)
    return [points[i : i + size] for i in range(0, len(points), size)]


def ticks(low: float, high: float, num: int) -> list[float]:
    """About `num` round numbers (1, 2, 2.5 or 5 times a power of ten apart) between low and high."""
    raw = (high - low) / max(num, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _clean(line: Line, position: int) -> Line:
    colour = (position if line.colour < 0 else line.colour) % NUM_COLOURS
    return line._replace(points=thin(line.points), colour=colour)


def _axes(xs: Sequence[float], ys: Sequence[float], zero: bool) -> _Axes:
    x0, x1, y0, y1 = min(xs), max(xs), min(ys), max(ys)
    if x0 == x1:
        x0, x1 = x0 - 1, x1 + 1
    margin = 0.06 * (y1 - y0)
    if margin < 1e-9 * max(abs(y0), abs(y1), 1e-6):  # a flat line: give it some room on its own scale
        margin = 0.1 * abs(y1) or 1.0
    return _Axes(x0, x1, 0.0 if zero and y0 >= 0 else y0 - margin, y1 + margin)


def _grid(axes: _Axes) -> str:
    marks = ticks(axes.y0, axes.y1, 4)
    digits = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9)) if len(marks) > 1 else 2
    if len(marks) > 1 and round((marks[1] - marks[0]) * 10**digits, 6) % 1:
        digits += 1  # a step of 2.5
    parts = []
    for value in marks:
        y = axes.y(value)
        text = f"{value:,.{digits}f}" if digits <= 4 else f"{value:.3g}".replace("e-0", "e-")
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{y + 3.5:.1f}">{text if value else "0"}</text>')
    whole = [value for value in ticks(axes.x0, axes.x1, 5) if value == int(value)]
    for value in whole:
        parts.append(f'<text class="x" x="{axes.x(value):.1f}" y="{HEIGHT - 6}">{int(value)}</text>')
    return f'<g class="grid">{"".join(parts)}</g>'


def _dot(axes: _Axes, line: Line, x: float, y: float) -> str:
    words = f"{escape(line.name)}, iteration {x:g}: {number(y)}"
    at = f'cx="{axes.x(x):.1f}" cy="{axes.y(y):.1f}"'
    return f'<circle class="c{line.colour}" {at} r="3"><title>{words}</title></circle>'


def _legend(entries: Sequence[tuple[str, int | str]]) -> str:
    looks = [f'class="k{c}"' if isinstance(c, int) else f'style="background:{c}"' for _, c in entries]
    keys = "".join(f"<span><i {look}></i>{escape(name)}</span>" for (name, _), look in zip(entries, looks, strict=True))
    return f'<div class="legend">{keys}</div>' if keys else ""


def _figure(title: str, note: str, latest: str, legend: Sequence[tuple[str, int | str]], parts: Sequence[str]) -> str:
    small = f" <small>{escape(note)}</small>" if note else ""
    value = f"<b>{escape(latest)}</b>" if latest else ""
    return (
        f"<figure><figcaption><span>{escape(title)}{small}</span>{value}</figcaption>{_legend(legend)}"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg></figure>'
    )
