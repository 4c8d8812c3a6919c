"""Wins, ties and losses of pairs of videos, and how sure they are: pure functions on numbers, float64.

Pairs of one prompt are alike, so prompts and not pairs are what counts: intervals resample prompts, and the sign test
has one vote a prompt.

N pairs
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.clusters import Values, clustered, unanimous


class Rate(NamedTuple):
    """How often the tuned model's video beats the base's; nan where there is nothing to compute from."""

    rate: float  # wins and half of the ties, over the pairs
    low: float  # 95 % interval over prompts
    high: float
    p: float  # sign test, two-sided, one vote a prompt
    wins: int
    ties: int
    losses: int
    masked: int  # pairs that a judge could not compare


class Change(NamedTuple):
    """A mean of the base's and of the tuned model's videos, over the pairs that have both."""

    base: float
    tuned: float
    change: float
    low: float  # 95 % interval of the change, over prompts
    high: float
    pairs: int


def outcomes(base: Values, tuned: Values, tie: float = 0.0) -> np.ndarray:
    """(N,) 1 where the tuned model's score is higher, 0.5 where the two differ by `tie` at most, 0 where it is lower.

    Args:
        base, tuned: (N,) scores; nan is a pair that was not compared, and stays nan.
        tie: 0 or more.
    """
    difference = np.asarray(tuned, float) - np.asarray(base, float)
    decided = np.where(np.abs(difference) <= tie, 0.5, (difference > 0).astype(float))
    return np.where(np.isnan(difference), np.nan, decided)


def win_rate(found: Values, prompts: Sequence[int]) -> Rate:
    """Count outcomes.

    Where every pair has the same outcome, resampling sees no spread, however few they are: the interval is then the
    exact one of Clopper and Pearson (1934), which for n wins of n is from 0.025^(1/n) to 1.

    Args:
        found: (N,) 1, 0.5 or 0, as `outcomes` gives them; nan is masked. More than one of a pair, as from several
            people, may stand there.
        prompts: (N,) which prompt each pair is of.
    """
    found, prompts = np.asarray(found, float), np.asarray(prompts)
    known = ~np.isnan(found)
    values, clusters = found[known], prompts[known]
    wins, losses = int((values > 0.5).sum()), int((values < 0.5).sum())
    rate, low, high = clustered(values, clusters)
    num = len(set(clusters.tolist()))
    if num and wins == len(values):
        low = unanimous(num)
    if num and losses == len(values):
        high = 1 - unanimous(num)
    votes = [float(values[clusters == prompt].mean()) for prompt in dict.fromkeys(clusters.tolist())]
    p = sign_test(sum(vote > 0.5 for vote in votes), sum(vote < 0.5 for vote in votes))
    return Rate(rate, low, high, p, wins, len(values) - wins - losses, losses, int((~known).sum()))


def change(base: Values, tuned: Values, prompts: Sequence[int]) -> Change:
    """Mean difference of paired scores (N,); pairs with a nan are left out."""
    base, tuned, prompts = np.asarray(base, float), np.asarray(tuned, float), np.asarray(prompts)
    known = ~(np.isnan(base) | np.isnan(tuned))
    base, tuned, prompts = base[known], tuned[known], prompts[known]
    if not len(base):
        return Change(*[math.nan] * 5, 0)
    return Change(float(base.mean()), float(tuned.mean()), *clustered(tuned - base, prompts), len(base))


def sign_test(wins: int, losses: int) -> float:
    """Two-sided p value of so many wins and losses if both were as likely; ties do not count. 1 of nothing.

    Source: Dixon and Mood, The Statistical Sign Test (1946); exact, from the binomial distribution.
    """
    num = wins + losses
    tail = sum(math.comb(num, k) for k in range(min(wins, losses) + 1))
    return min(1.0, 2 * tail / 2**num)


def spread_of_seeds(values: Values, prompts: Sequence[int]) -> float:
    """Standard deviation between the samples of one prompt, pooled over prompts; nan where no prompt has two."""
    values, prompts = np.asarray(values, float), np.asarray(prompts)
    groups = [values[(prompts == prompt) & ~np.isnan(values)] for prompt in dict.fromkeys(prompts.tolist())]
    squares = sum(float(((group - group.mean()) ** 2).sum()) for group in groups if len(group) > 1)
    freedom = sum(len(group) - 1 for group in groups if len(group) > 1)
    return math.sqrt(squares / freedom) if freedom else math.nan
