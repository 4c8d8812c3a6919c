"""Charts of accuracies as inline SVG, in the looks of the run report (alignment.report.charts): bars, histograms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from alignment.report.charts import NUM_COLOURS

from .metrics import Array

WIDTH, LEFT, RIGHT = 520, 150, 48
ROW, GAP, TOP = 17, 14, 20
BINS = 31  # an odd number, so that 0 is inside one


class Bar(NamedTuple):
    name: str
    value: float  # 0 to 1
    low: float
    high: float
    chance: float
    colour: int


def bars(groups: Sequence[tuple[str, Sequence[Bar]]], label: str) -> str:
    """Groups of horizontal bars from 0 to 100 %, each with its interval and a mark at chance."""
    y, parts = TOP, []
    for title, group in groups:
        parts.append(f'<text class="title" x="0" y="{y + 12}">{escape(title)}</text>')
        for bar in group:
            parts += _bar(bar, y)
            y += ROW
        y += GAP
    ticks = [
        f'<line x1="{_x(t):.1f}" x2="{_x(t):.1f}" y1="{TOP - 4}" y2="{y - GAP}"/>'
        f'<text class="x" x="{_x(t):.1f}" y="{TOP - 8}">{100 * t:.0f}</text>'
        for t in (0, 0.25, 0.5, 0.75, 1)
    ]
    grid = f'<g class="grid">{"".join(ticks)}</g>'
    return _svg(WIDTH, y, label, grid + "".join(parts), "bars")


def _bar(bar: Bar, y: float) -> list[str]:
    middle = y + ROW / 2
    name = bar.name if len(bar.name) <= 18 else f"{bar.name[:17]}\u2026"
    parts = [f'<text class="name" x="{LEFT - 8}" y="{middle + 4}">{escape(name)}</text>']
    if math.isnan(bar.value):
        return [*parts, f'<text class="value" x="{LEFT + 4}" y="{middle + 4}">none</text>']
    words = f"{bar.name}: {100 * bar.value:.1f} %"
    parts.append(
        f'<rect class="area c{bar.colour % NUM_COLOURS}" x="{LEFT}" y="{y + 2}" width="{_x(bar.value) - LEFT:.1f}" '
        f'height="{ROW - 4}" rx="2"><title>{escape(words)}</title></rect>'
    )
    end = bar.value
    if not math.isnan(bar.low):
        x0, x1, end = _x(bar.low), _x(bar.high), max(bar.value, bar.high)
        parts.append(
            f'<path class="whisker" d="M{x0:.1f} {middle}H{x1:.1f}M{x0:.1f} {middle - 3}v6M{x1:.1f} {middle - 3}v6"/>'
        )
    if not math.isnan(bar.chance):
        x = _x(bar.chance)
        parts.append(f'<line class="chance" x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + ROW}"/>')
    return [*parts, f'<text class="value" x="{_x(end) + 6:.1f}" y="{middle + 4}">{100 * bar.value:.1f}</text>']


def _x(share: float) -> float:
    return LEFT + share * (WIDTH - LEFT - RIGHT)


def histogram(title: str, labels: Array, margins: Array) -> str:
    """Margins towards the video that people like better, and those of pairs that they call a tie, stacked.

    Right of 0 the reward agrees with people. The outermost bins hold what is further out than 99 % of the margins.
    """
    known = ~np.isnan(labels) & ~np.isnan(margins)
    labels, margins = labels[known], margins[known]
    decided = labels[labels != 0] * margins[labels != 0]
    tied = margins[labels == 0]
    if not len(margins):
        return ""
    limit = float(np.quantile(np.abs(margins), 0.99)) or 1.0
    edges = np.linspace(-limit, limit, BINS + 1)
    counts = [np.histogram(np.clip(part, -limit, limit), edges)[0] for part in (decided, tied)]
    width, height, left, bottom = 360, 170, 8, 24
    most = max(1, int((counts[0] + counts[1]).max()))
    step, scale = (width - 2 * left) / BINS, (height - bottom - 10) / most
    parts = []
    for place, (clear, tie) in enumerate(zip(*counts, strict=True)):
        x, y = left + place * step, height - bottom
        middle = BINS // 2
        colour = "c2" if place > middle else "c4" if place < middle else "c5"
        for count, look in ((clear, f"area {colour}"), (tie, "area c5 faint")):
            y -= count * scale
            if count:
                box = f'x="{x:.1f}" y="{y:.1f}" width="{step - 1:.1f}" height="{count * scale:.1f}"'
                parts.append(f'<rect class="{look}" {box}/>')
    axis = "".join(
        f'<text class="x" x="{left + (value + limit) / (2 * limit) * (width - 2 * left):.1f}" y="{height - 8}">'
        f"{value:.3g}</text>"
        for value in (-limit * 0.9, 0, limit * 0.9)
    )
    base = f'<line x1="{left}" x2="{width - left}" y1="{height - bottom}" y2="{height - bottom}"/>'
    drawing = _svg(width, height, title, f'<g class="grid">{base}{axis}</g>' + "".join(parts))
    return (
        f"<figure><figcaption><span>{escape(title)} <small>{len(decided)} decided, {len(tied)} tied</small></span>"
        f"</figcaption>{drawing}</figure>"
    )


def histogram_legend() -> str:
    """What the colours of `histogram` mean, once for all."""
    keys = [("agrees with people", "k2"), ("disagrees", "k4"), ("a tie to people, either way", "k5")]
    return f'<div class="legend">{"".join(f"<span><i class={key!r}></i>{name}</span>" for name, key in keys)}</div>'


def _svg(width: float, height: float, label: str, content: str, kind: str = "") -> str:
    look = f' class="{kind}"' if kind else ""
    return f'<svg{look} viewBox="0 0 {width} {height}" role="img" aria-label="{escape(label)}">{content}</svg>'
