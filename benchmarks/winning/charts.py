"""Charts of a comparison as inline SVG, in the run report's looks: bars of win rates, and distributions of scores."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import numpy as np

from alignment.gains import finite, number
from alignment.report.charts import ticks

WIDTH, ROW, LABEL, NUMBERS = 760, 30, 250, 150  # of the bars' drawing, in its own units; the page scales it
BINS = 24
LONGEST = 34  # letters of a label


class Bar(NamedTuple):
    label: str
    rate: float  # 0 to 1; nan: no bar
    low: float  # nan: no interval
    high: float
    words: str  # behind the bar
    colour: int  # 0 to 5, of the page
    faint: bool = False  # a dimension of the bar above


def bars(found: Sequence[Bar]) -> str:
    """Win rates, one below the other, with their intervals and a dashed line at 50 %; "" of nothing."""
    if not found:
        return ""
    height, right = ROW * len(found) + 26, WIDTH - NUMBERS
    scale = (right - LABEL) / 1.0
    parts = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        x = LABEL + share * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{height - 22}"/>')
        parts.append(f'<text class="x" x="{x:.1f}" y="{height - 6}">{share:.0%}</text>')
    grid = f'<g class="grid">{"".join(parts)}</g>'
    rows = []
    for i, bar in enumerate(found):
        y, thick = i * ROW + ROW / 2, 9 if bar.faint else 16
        label = bar.label if len(bar.label) <= LONGEST else f"{bar.label[: LONGEST - 3]}..."
        place = f'x="24" y="{y + 4.5}" font-size="13"' if bar.faint else f'x="0" y="{y + 4.5}" font-size="14"'
        rows.append(f'<text {place} fill="currentColor"><title>{escape(bar.label)}</title>{escape(label)}</text>')
        if finite(bar.rate):
            fill = f'fill="var(--c{bar.colour})" fill-opacity="{0.45 if bar.faint else 0.85}"'
            rows.append(
                f'<rect x="{LABEL}" y="{y - thick / 2}" width="{bar.rate * scale:.1f}" height="{thick}" {fill}/>'
            )
        if finite(bar.low):
            low, high = LABEL + bar.low * scale, LABEL + bar.high * scale
            ends = "".join(f"M{x:.1f} {y - 5}V{y + 5}" for x in (low, high))
            path = f"M{low:.1f} {y}H{high:.1f}{ends}"
            rows.append(f'<path d="{path}" stroke="#1d2330" stroke-width="1.5" fill="none"/>')
        rows.append(
            f'<text x="{right + 10}" y="{y + 4.5}" font-size="13" fill="currentColor">{escape(bar.words)}</text>'
        )
    middle = LABEL + 0.5 * scale
    rows.append(f'<line class="level" x1="{middle}" x2="{middle}" y1="0" y2="{height - 22}" stroke-width="1.5"/>')
    view = f'viewBox="0 0 {WIDTH} {height}" role="img" aria-label="win rates"'
    return f'<svg {view} style="max-width:{WIDTH}px">{grid}{"".join(rows)}</svg>'


def distributions(title: str, groups: Sequence[tuple[str, Sequence[float], int]], note: str = "") -> str:
    """Histograms over one another, with a line at each mean; "" where no group has a number.

    Args:
        groups: (name, values, colour); nan is left out.
    """
    groups = [(name, np.asarray(values, float), colour) for name, values, colour in groups]
    groups = [(name, values[np.isfinite(values)], colour) for name, values, colour in groups]
    groups = [group for group in groups if len(group[1])]
    if not groups:
        return ""
    every = np.concatenate([values for _, values, _ in groups])
    low, high = float(every.min()), float(every.max())
    if low == high:
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BINS + 1)
    shares = [np.histogram(values, edges)[0] / len(values) for _, values, _ in groups]
    top = max(float(share.max()) for share in shares)
    width, height, bottom = 360, 170, 22
    parts, keys = [], []
    for value in ticks(low, high, 4):
        x = (value - low) / (high - low) * width
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - bottom}"/>')
        anchor = "start" if x < 16 else "end" if x > width - 16 else "middle"
        place = f'class="x" style="text-anchor:{anchor}" x="{x:.1f}" y="{height - 6}"'
        parts.append(f"<text {place}>{value:.6g}</text>")
    shapes = []
    for (name, values, colour), share in zip(groups, shares, strict=True):
        ys = height - bottom - share / top * (height - bottom - 10)
        steps = " ".join(
            f"{i * width / BINS:.1f},{y:.1f} {(i + 1) * width / BINS:.1f},{y:.1f}" for i, y in enumerate(ys)
        )
        around = f"0,{height - bottom} {steps} {width},{height - bottom}"
        shapes.append(f'<polygon points="{around}" fill="var(--c{colour})" fill-opacity="0.28"/>')
        shapes.append(f'<polyline class="line c{colour}" points="{steps}"/>')
        x = (float(values.mean()) - low) / (high - low) * width
        line = f'x1="{x:.1f}" x2="{x:.1f}" y1="6" y2="{height - bottom}"'
        shapes.append(f'<line class="c{colour}" stroke-width="1.6" stroke-dasharray="5 3" {line}/>')
        keys.append(f'<span><i class="k{colour}"></i>{escape(name)} {number(float(values.mean()))}</span>')
    small = f" <small>{escape(note)}</small>" if note else ""
    return (
        f'<figure><figcaption><span>{escape(title)}{small}</span></figcaption><div class="legend">{"".join(keys)}</div>'
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title)}">'
        f'<g class="grid">{"".join(parts)}</g>{"".join(shapes)}</svg></figure>'
    )
