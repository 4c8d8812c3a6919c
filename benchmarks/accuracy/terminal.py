"""The ranking on a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table

from .data import Benchmark
from .layouts import FORMATS
from .output import Outcome
from .protocols import TITLES, Measured, behind, note_on


def show(found: Benchmark, ranked: Sequence[Outcome], console: Console) -> None:
    """Accuracy of every reward, measure and dimension, best first."""
    console.print(coverage(found))
    dims = found.dims
    names = [Column("reward", no_wrap=True), Column("accuracy", no_wrap=True)]
    lagging = [Column("behind")][: len(ranked) - 1]
    table = Table(*names, *dims, *lagging, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for place, outcome in enumerate(ranked):
        for measure in next(iter(outcome.answers.values())).measures:
            cells = [_short(outcome.answers[dim].measures[measure]) for dim in dims]
            first = measure == next(iter(outcome.answers[dims[0]].measures))
            lag = behind(ranked[0].answers, outcome.answers, found.prompts) if first and place else None
            table.add_row(outcome.name if first else "", TITLES[measure], *cells, *[_lag(lag)][: len(ranked) - 1])
    chances = {name: m.chance for name, m in ranked[0].answers[dims[0]].measures.items()}
    for measure in chances:
        cells = [share(ranked[0].answers[dim].measures[measure].chance) for dim in dims]
        table.add_row("(chance)" if measure == next(iter(chances)) else "", TITLES[measure], *cells)
    console.print(table)
    for outcome in ranked:
        for line in notes(outcome):
            console.print(f"{outcome.name}: {line}")


def coverage(found: Benchmark) -> str:
    """What was compared, and what share of the data that is."""
    words = f"{FORMATS[found.format].title}: {len(found.pairs)} pairs of {len(set(found.prompts))} prompts"
    if found.missing:
        share = len(found.pairs) / found.named_pairs
        words += (
            f", {share:.1%} of {found.named_pairs}; {len(found.missing)} of {found.named} media files are missing, so "
            "no figure can be set beside one of the whole"
        )
    return words


def notes(outcome: Outcome) -> list[str]:
    """What a reader has to know of one reward's figures."""
    scored, lines = outcome.scored, []
    if words := note_on(outcome.answers):
        lines.append(words)
    unscored = max(m.unscored for answer in outcome.answers.values() for m in answer.measures.values())
    if scored.failed:
        names = "; ".join(f"{name}: {reason}" for name, reason in list(scored.failed.items())[:3])
        lines.append(f"{len(scored.failed)} without a score ({names}); {unscored} pairs count as wrong for it")
    elif unscored:
        lines.append(f"{unscored} pairs count as wrong, since a number that was to be compared is missing")
    return lines


def percent(measured: Measured) -> str:
    """`73.6 (71.2 to 75.9)`."""
    around = "" if math.isnan(measured.low) else f" ({100 * measured.low:.1f} to {100 * measured.high:.1f})"
    return share(measured.value) + around


def _short(measured: Measured) -> str:
    """`73.6 (71-76)`, for narrow terminals."""
    around = "" if math.isnan(measured.low) else f" ({100 * measured.low:.0f}-{100 * measured.high:.0f})"
    return share(measured.value) + around


def _lag(lag: Sequence[float] | None) -> str:
    if lag is None:
        return ""
    return f"{100 * lag[0]:+.1f}" + ("" if math.isnan(lag[1]) else f" ({100 * lag[1]:+.0f} {100 * lag[2]:+.0f})")


def share(value: float) -> str:
    return "" if math.isnan(value) else f"{100 * value:.1f}"


def points(lag: Sequence[float]) -> str:
    """`-3.1 (-5.0 to -1.2)`, in percent points."""
    value, low, high = (100 * part for part in lag)
    return f"{value:+.1f}" + ("" if math.isnan(low) else f" ({low:+.1f} to {high:+.1f})")
