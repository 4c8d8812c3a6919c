"""result.png: win rates with their intervals beside the distributions of scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignment.gains import finite

from ..pictures import pyplot
from .charts import BINS
from .judges import INDEPENDENT, TRAINED
from .scoring import OVERALL
from .summary import Comparison, Row, rate_words, shown

COLOURS = {TRAINED: "#e07b16", INDEPENDENT: "#2563c9"}  # others are grey
BASE_COLOUR, TUNED_COLOUR = "#8a93a3", "#2563c9"
MAX_HISTOGRAMS = 6
Scores = Mapping[str, tuple[np.ndarray, np.ndarray]]  # judge -> base's and tuned's


def plot(comparisons: Sequence[Comparison], scores: Sequence[Scores], path: Path) -> None:
    """Of each tuned model its bars, and below them the histograms of the judges that score."""
    plt = pyplot()
    across = max(1, min(MAX_HISTOGRAMS, max(len(each) for each in scores)))
    rows = [shown(comparison.rows) for comparison in comparisons]
    tall = [height for each in rows for height in (0.27 * len(each) + 0.7, 1.9)]
    figure = plt.figure(figsize=(max(8.0, 2.3 * across), sum(tall)), layout="constrained")
    grid = figure.add_gridspec(len(tall), across, height_ratios=tall)
    for i, (comparison, each) in enumerate(zip(comparisons, scores, strict=True)):
        _bars(figure.add_subplot(grid[2 * i, :]), comparison.name, rows[i])
        for column, (judge, values) in enumerate(list(each.items())[:across]):
            _histogram(figure.add_subplot(grid[2 * i + 1, column]), judge, *values, legend=column == 0)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis: Any, name: str, rows: Sequence[Row]) -> None:
    rows = rows[::-1]
    for y, row in enumerate(rows):
        total, rate = row.dim == OVERALL, row.rate
        if finite(rate.rate):
            alpha = 0.9 if total else 0.45
            axis.barh(y, rate.rate, 0.62 if total else 0.4, color=COLOURS.get(row.relation, "#8a93a3"), alpha=alpha)
            axis.text(1.02, y, rate_words(rate), va="center", fontsize=8)
        if finite(rate.low):
            axis.plot([rate.low, rate.high], [y, y], color="#1d2330", lw=1.2, marker="|", ms=6)
    axis.axvline(0.5, color="#1d2330", lw=1, ls="--")
    names = [f"{row.judge}: {row.relation}" if row.dim == OVERALL else f"{row.judge} / {row.dim}" for row in rows]
    axis.set_yticks(range(len(rows)), names, fontsize=8)
    axis.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1], ylim=(-0.6, len(rows) - 0.4))
    axis.set_xticklabels(["0%", "25%", "50%", "75%", "100%"], fontsize=8)
    axis.set_title(f"{name}: pairs won against the base, 95 % intervals of prompts", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)


def _histogram(axis: Any, judge: str, base: np.ndarray, tuned: np.ndarray, legend: bool) -> None:
    base, tuned = base[np.isfinite(base)], tuned[np.isfinite(tuned)]
    every = np.concatenate([base, tuned])
    if len(every):
        edges = np.histogram_bin_edges(every, BINS)
        for name, values, colour in (("base", base, BASE_COLOUR), ("tuned", tuned, TUNED_COLOUR)):
            if len(values):
                axis.hist(values, edges, color=colour, alpha=0.5, label=name)
                axis.axvline(values.mean(), color=colour, ls="--", lw=1.2)
    axis.set_title(judge, fontsize=9, loc="left")
    axis.tick_params(labelsize=7)
    axis.locator_params(axis="x", nbins=4)
    axis.set_yticks([])
    axis.spines[["top", "right", "left"]].set_visible(False)
    if legend and len(every):
        axis.legend(frameon=False, fontsize=7)
