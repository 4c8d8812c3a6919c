"""The picture: accuracies with intervals and published figures, and how surely the first reward is right."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pictures import pyplot
from .data import OVERALL, Benchmark
from .layouts import FORMATS
from .output import Outcome
from .protocols import TITLES, labels_of
from .published import PUBLISHED
from .terminal import coverage

COLOURS = ("#2563c9", "#e07b16", "#14907a", "#8b4fc4", "#c8386b", "#8a93a3")
INK, SOFT = "#1d2330", "#626b7c"
BINS = 10


def plot(found: Benchmark, ranked: Sequence[Outcome], path: Path) -> None:
    """Write a PNG."""
    plt = pyplot()
    measures = list(next(iter(ranked[0].answers.values())).measures)[:2]
    style = {"font.size": 9.5, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#c9ced8"}
    style |= {
        "text.color": INK,
        "axes.labelcolor": SOFT,
        "xtick.color": SOFT,
        "ytick.color": INK,
        "axes.titleweight": "bold",
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(1, len(measures) + 1, figsize=(4.6 * (len(measures) + 1), _height(found, ranked)))
        for axis, name in zip(axes, measures, strict=False):
            _accuracies(axis, found, ranked, name)
        _sureness(axes[-1], found, ranked)
        figure.suptitle(
            f"Agreement with people: {FORMATS[found.format].title}", fontsize=14, fontweight="bold", x=0.01, ha="left"
        )
        figure.text(0.01, 0.02, coverage(found).partition(": ")[2], color=SOFT, fontsize=8.5)
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="lower right", ncols=min(6, len(names)), frameon=False, fontsize=8.5)
        figure.tight_layout(rect=(0, 0.06, 1, 0.97), w_pad=2.5)
        figure.savefig(path, dpi=150, format="png")
        plt.close(figure)


def _height(found: Benchmark, ranked: Sequence[Outcome]) -> float:
    return min(14.0, max(4.2, 1.8 + 0.3 * len(found.dims) * (len(ranked) + 0.9)))


def _accuracies(axis: Any, found: Benchmark, ranked: Sequence[Outcome], name: str) -> None:
    """A dot with its interval for each dimension and reward; published figures as diamonds, chance as a line."""
    rows = PUBLISHED.get(found.format, [])
    place, ticks = 0.0, []
    for dim in found.dims:
        start = place
        for number, outcome in enumerate(ranked):
            measured, colour = outcome.answers[dim].measures[name], COLOURS[number % len(COLOURS)]
            if not math.isnan(measured.value):
                if not math.isnan(measured.low):
                    axis.plot(
                        [100 * measured.low, 100 * measured.high],
                        [place] * 2,
                        color=colour,
                        lw=5,
                        alpha=0.25,
                        solid_capstyle="round",
                    )
                label = outcome.name if dim == found.dims[0] else None
                axis.plot(100 * measured.value, place, "o", color=colour, ms=7, label=label)
                axis.annotate(
                    f"{100 * measured.value:.1f}",
                    (100 * measured.value, place),
                    (0, 6),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color=colour,
                )
            place += 1
        known = [row.values[(name, dim)] for row in rows if (name, dim) in row.values and row.model != "random"]
        label = "published, of the whole set" if dim == found.dims[0] else None
        axis.plot(
            known,
            [(start + place - 1) / 2] * len(known),
            "D",
            color="#c9ced8",
            ms=4,
            label=label if known else None,
            zorder=0,
        )
        chance = ranked[0].answers[dim].measures[name].chance
        if not math.isnan(chance):
            axis.plot(
                [100 * chance] * 2,
                [start - 0.45, place - 0.55],
                "--",
                color=SOFT,
                lw=1,
                label="chance" if label else None,
            )
        ticks.append(((start + place - 1) / 2, dim))
        place += 0.9
    axis.set_yticks([tick for tick, _ in ticks], [dim for _, dim in ticks])
    axis.set_ylim(place - 0.6, -0.9)
    axis.set_xlim(-3, 105)
    axis.set_xlabel("percent")
    axis.grid(axis="x", color="#eceef2")
    axis.set_axisbelow(True)
    axis.tick_params(length=0)
    axis.set_title(f"Accuracy {TITLES[name]}", loc="left", fontsize=11)


def _sureness(axis: Any, found: Benchmark, ranked: Sequence[Outcome]) -> None:
    """How often each reward is right among the pairs of which it is less or more sure, tenth by tenth."""
    dim = OVERALL if OVERALL in found.dims else found.dims[0]
    labels = labels_of(found, dim)
    for number, outcome in enumerate(ranked):
        margins = outcome.answers[dim].margins
        clear = np.abs(labels) == 1
        clear &= ~np.isnan(margins)
        if clear.sum() < 2:
            continue
        right = (labels * margins > 0)[clear][np.argsort(np.abs(margins[clear]), kind="stable")]
        parts = np.array_split(right, min(BINS, max(1, len(right) // 5)))
        x = (np.cumsum([len(part) for part in parts]) - np.array([len(part) for part in parts]) / 2) / len(right)
        axis.plot(
            100 * x,
            [100 * part.mean() for part in parts],
            "o-",
            color=COLOURS[number % len(COLOURS)],
            ms=4,
            lw=1.8,
            label=outcome.name,
        )
    axis.axhline(50, ls="--", color=SOFT, lw=1)
    axis.set_ylim(-3, 103)
    axis.set_xlim(0, 100)
    axis.set_xlabel("pairs from the smallest to the largest margin, percent")
    axis.set_ylabel("right, percent")
    axis.grid(color="#eceef2")
    axis.tick_params(length=0)
    axis.set_title(f"Is it right when it is sure? {dim}", loc="left", fontsize=11)
