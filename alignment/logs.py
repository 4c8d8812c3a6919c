"""The lines of metrics.jsonl as columns of usable numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .gains import finite, mean

ENDS = 3  # iterations averaged at either end of the run

Metrics = Sequence[Mapping[str, Any]]


def column(metrics: Metrics, key: str) -> list[float]:
    """The usable values of one metric, in order."""
    return [line[key] for line in metrics if finite(line.get(key))]


def lately(metrics: Metrics, key: str) -> float:
    """Mean of a metric over the last third of its values; nan where there are none."""
    values = column(metrics, key)
    return mean(values[-max(1, len(values) // 3) :])


def phase_seconds(metrics: Metrics) -> dict[str, float]:
    """Seconds of the whole run by phase: rollout, decode, reward, update, and other (the rest of the iterations)."""
    phases = {name: sum(column(metrics, f"time/{name}")) for name in ("rollout", "decode", "reward", "update")}
    rest = sum(column(metrics, "time/iteration")) - sum(phases.values())
    return {name: seconds for name, seconds in (phases | {"other": max(rest, 0.0)}).items() if seconds > 0}
