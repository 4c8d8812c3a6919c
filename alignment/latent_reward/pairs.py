"""Labelled pairs for a reward of several dimensions: the loss, and what share of them a reward ranks right.

P pairs, D dimensions; labels are 1 where the first is better, -1 where the second is, 0 for a tie, NaN where unknown
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..data import Group, Pair, label_from_scores, label_of, pair_of
from ..errors import UserError
from ..objectives import bradley_terry_with_ties

OVERALL = "overall"  # the dimension of a pair's one label


def labelled(
    records: Sequence[Pair | Group], dimensions: Sequence[str], tie_eps: float, place: str
) -> list[tuple[Pair, tuple[float, ...]]]:
    """Every pair with its D labels; of a group every two videos.

    Args:
        dimensions: of labels or scores; none: a pair's one label.
        tie_eps: scores that are no further apart are a tie.
        place: where the records are from, for messages.
    Raises: UserError for a dimension of which no pair is decided.
    """
    found = []
    for record in records:
        for pair in every_two(record) if isinstance(record, Group) else [record]:
            own = [label_of(pair, dimension, tie_eps) for dimension in dimensions or [None]]
            found.append((pair, tuple(math.nan if label is None else float(label) for label in own)))
    for name, column in zip(dimensions or [OVERALL], zip(*(labels for _, labels in found), strict=True), strict=True):
        if not any(label in (1, -1) for label in column):
            known = sorted({name for pair, _ in found for name in (*pair.labels, *pair.scores)})
            raise UserError(
                f"{place}: no pair is decided by {name}; annotate them, or set algorithm.dimensions to some of "
                f"{', '.join(known) or 'those that they have'}"
            )
    return [(pair, labels) for pair, labels in found if not all(map(math.isnan, labels))]


def every_two(group: Group) -> list[Pair]:
    """The pairs of a group's videos, labelled by their scores."""
    pairs = [pair_of(group, i, j) for i, j in combinations(range(len(group.members)), 2)]
    return [pair._replace(label=label_from_scores(pair.scores)) for pair in pairs]


def preference_losses(difference: Tensor, labels: Tensor, theta: float | None) -> Tensor:
    """(P, D) losses, 0 where there is nothing to learn: `counted` says where that is not so.

    Args:
        difference: (P, D) score of the first minus that of the second.
        labels: (P, D).
        theta: of Bradley-Terry with ties; None: plain Bradley-Terry, -log sigmoid(label difference), without them.
    """
    known = labels.nan_to_num()
    losses = -F.logsigmoid(known * difference)
    if theta is not None:
        losses = bradley_terry_with_ties(difference, known, theta)
    return torch.where(counted(labels, theta), losses, 0.0)


def counted(labels: Tensor, theta: float | None) -> Tensor:
    """Bool, of the labels' shape: those that the loss learns from."""
    known = ~labels.isnan()
    return known if theta is not None else known & (labels != 0)


def ranked_right(difference: Tensor, labels: Tensor) -> Tensor:
    """(P, D) 1 where the better one scores higher, 0 where lower, 1/2 where neither does; NaN without a winner."""
    right = 0.5 + 0.5 * (difference.detach().sign() * labels.nan_to_num())
    return torch.where(labels.abs() == 1, right, torch.nan)


class Share(NamedTuple):
    """A share of pairs with its 95 % interval."""

    mean: float
    low: float
    high: float
    num: int


def share(right: Tensor) -> Share:
    """Of values in [0, 1], one a pair, NaN for those that do not count; Wilson's interval.

    With all pairs ranked right the interval still has a width, which a bootstrap's has not.

    Source: Wilson (1927), Probable Inference; exact enough for few pairs.
    """
    right = right[~right.isnan()]
    num = len(right)
    if num == 0:
        return Share(math.nan, math.nan, math.nan, 0)
    p, z = float(right.mean()), 1.959964
    middle, half = p + z**2 / (2 * num), z * math.sqrt(p * (1 - p) / num + z**2 / (4 * num**2))
    scale = 1 + z**2 / num
    return Share(p, (middle - half) / scale, (middle + half) / scale, num)
