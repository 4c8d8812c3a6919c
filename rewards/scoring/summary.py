"""What the scores say together: spread of every number, and agreement with people's choices between pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rewards.scoring.asking import Row
from rewards.scoring.tables import LABELS, Pair


class Spread(NamedTuple):
    """Of one column over the videos that have it."""

    column: str
    valid: int
    mean: float
    std: float  # of a sample; NaN for a single video
    low: float
    high: float


class Agreement(NamedTuple):
    """Share of pairs with a preference in which the preferred video has the higher score."""

    column: str
    label: str
    share: float
    pairs: int


def spreads(rows: Sequence[Row], rewards: Sequence[str]) -> list[Spread]:
    """Totals and dims of every reward. A number whose reward is not valid for the video does not count."""
    found = []
    for name in rewards:
        for column in (name, *_dims(rows, name)):
            values = [row[column] for row in rows if _number(row, name, column) is not None]
            mean = statistics.fmean(values) if values else math.nan
            std = statistics.stdev(values) if len(values) > 1 else math.nan
            low, high = min(values, default=math.nan), max(values, default=math.nan)
            found.append(Spread(column, len(values), mean, std, low, high))
    return found


def agreements(rows: Sequence[Row], pairs: Sequence[Pair], rewards: Sequence[str]) -> list[Agreement]:
    """For each label the dim of its name; for a reward of its name, and for Overall, the total.

    Pairs labelled "same", and those in which a score is missing, do not count; equal scores count as wrong, as in
    VideoAlign's own count without ties.
    """
    found = []
    for name in rewards:
        dims = _dims(rows, name)
        for label in LABELS:
            column = f"{name}/{label}" if f"{name}/{label}" in dims else name
            if column == name and label not in (name, "Overall"):
                continue
            hits = []
            for pair in pairs:
                first, second = (_number(rows[place], name, column) for place in (pair.first, pair.second))
                if pair.labels.get(label) in ("A", "B") and first is not None and second is not None:
                    hits.append(first > second if pair.labels[label] == "A" else second > first)
            if hits:
                found.append(Agreement(column, label, sum(hits) / len(hits), len(hits)))
    return found


def _dims(rows: Sequence[Row], name: str) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row if column.startswith(f"{name}/")))


def _number(row: Row, name: str, column: str) -> float | None:
    return row.get(column) if row.get(f"{name}:valid") else None
