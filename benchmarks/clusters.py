"""Means of values that come in clusters, as pairs of one prompt do, and how sure they are; float64.

N values, P clusters
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from alignment.gains import resamples

LEVEL = 0.95
Values = Sequence[float] | NDArray


def clustered(
    values: Values, clusters: Sequence[object] | NDArray, weights: NDArray | None = None
) -> tuple[float, float, float]:
    """Weighted mean of (N,) values, and its 95 % bootstrap interval when whole clusters are drawn: the same each time.

    Returns: nan for the mean of nothing, and for the interval of fewer than two clusters.
    Source: Davison and Hinkley, Bootstrap Methods and their Application (1997), section 3.8.
    """
    values = np.asarray(values, float)
    weights = np.ones(len(values)) if weights is None else weights
    if not weights.sum():
        return math.nan, math.nan, math.nan
    names, place = np.unique(np.asarray(clusters, dtype=object).astype(str), return_inverse=True)
    sums, sizes = np.bincount(place, weights * values), np.bincount(place, weights)
    mean = float(sums.sum() / sizes.sum())
    if len(names) < 2:
        return mean, math.nan, math.nan
    drawn = resamples(len(names))
    low, high = np.quantile((drawn @ sums) / (drawn @ sizes), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean, float(low), float(high)


def unanimous(num: int) -> float:
    """Lower end of the exact interval of a share when all of num clusters agree; one minus it where none does.

    Resampling sees no spread there, however few they are. Source: Clopper and Pearson (1934).
    """
    return ((1 - LEVEL) / 2) ** (1 / num)
