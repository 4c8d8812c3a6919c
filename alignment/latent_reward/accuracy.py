"""What share of pairs a reward ranks right, and how sure that is."""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

Z = 1.959964  # 95 %


class Share(NamedTuple):
    """A share with its 95 % interval; NaN of nothing."""

    mean: float
    low: float
    high: float
    num: int


def share(right: Tensor) -> Share:
    """The mean of values in [0, 1], one a pair, with Wilson's interval; NaN values do not count.

    Where all are 1 or 0 the interval keeps its width, which a bootstrap's loses. For means of several answers about one
    pair it is too wide rather than too narrow.

    Source: Wilson (1927), Probable Inference, the Law of Succession, and Statistical Inference.
    """
    right = right[~right.isnan()].double()
    num = len(right)
    if num == 0:
        return Share(math.nan, math.nan, math.nan, 0)
    p = float(right.mean())
    middle, half = p + Z**2 / (2 * num), Z * math.sqrt(p * (1 - p) / num + Z**2 / (4 * num**2))
    scale = 1 + Z**2 / num
    return Share(p, (middle - half) / scale, (middle + half) / scale, num)
