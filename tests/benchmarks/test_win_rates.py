"""Rates, intervals and p values against hand arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.clusters import clustered
from benchmarks.winning.rates import change, outcomes, sign_test, spread_of_seeds, win_rate

NAN = math.nan


def test_outcomes_and_ties() -> None:
    base, tuned = [1.0, 1.0, 1.0, 1.0, NAN, 2.0], [1.3, 1.0, 0.5, 1.1, 1.0, NAN]
    np.testing.assert_array_equal(outcomes(base, tuned), [1, 0.5, 0, 1, NAN, NAN])
    np.testing.assert_array_equal(outcomes(base, tuned, tie=0.25), [1, 0.5, 0, 0.5, NAN, NAN])
    np.testing.assert_array_equal(outcomes([0.0, 0.0], [0.25, -0.25], tie=0.25), [0.5, 0.5])  # up to it, too


def test_a_win_rate_by_hand() -> None:
    """Prompt 0 wins 2 of 2, prompt 1 wins one and ties, prompt 2 loses, prompt 3 has no answer: 3.5 of 5.

    Votes of prompts: won, won, lost, so p = 2 (C(3,0) + C(3,1)) / 8 = 1.
    """
    found = win_rate([1, 1, 1, 0.5, 0, NAN], [0, 0, 1, 1, 2, 3])
    assert (found.wins, found.ties, found.losses, found.masked) == (3, 1, 1, 1)
    assert found.rate == 3.5 / 5
    assert found.p == 1.0
    assert found.low < found.rate < found.high


@pytest.mark.parametrize(
    ("wins", "losses", "p"),
    [(8, 2, 2 * (1 + 10 + 45) / 1024), (2, 8, 112 / 1024), (5, 0, 2 / 32), (3, 3, 1.0), (0, 0, 1.0), (1, 0, 1.0)],
)
def test_sign_test_counts_sequences(wins: int, losses: int, p: float) -> None:
    assert sign_test(wins, losses) == p


def test_sign_test_of_many_votes_is_the_normal_one() -> None:
    """530 of 1000 are 30 more than half, 29.5 with the correction for continuity, of a deviation of sqrt(1000) / 2."""
    z = 29.5 / math.sqrt(1000 / 4)
    assert sign_test(530, 470) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)


def test_p_of_more_votes_than_an_integer_has_bits() -> None:
    """59 of 100 prompts won: 8.5 of a deviation of 5 above half, by the normal law with the correction."""
    assert win_rate([1] * 59 + [0] * 41, range(100)).p == pytest.approx(math.erfc(1.7 / math.sqrt(2)), rel=0.02)


def test_interval_of_two_prompts() -> None:
    """A resample of two prompts is (0, 0), (0, 1) or (1, 1) with 1/4, 1/2, 1/4: the 2.5 % points are 0 and 1."""
    assert clustered([0, 1], [0, 1]) == (0.5, 0, 1)


def test_interval_is_that_of_prompts_not_of_pairs() -> None:
    """Normal theory for 200 prompts of known spread; ten copies of every pair are not ten times as many prompts."""
    values = np.random.default_rng(1).normal(size=200)
    mean, low, high = clustered(values, np.arange(200))
    half = 1.96 * values.std(ddof=1) / math.sqrt(200)
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.15 * half)
    copies = clustered(values.repeat(10), np.arange(200).repeat(10))
    assert copies == pytest.approx((mean, low, high))
    apart = clustered(values.repeat(10), np.arange(2000))
    assert apart[2] - apart[1] < 0.4 * (high - low)


def test_prompts_count_by_their_pairs() -> None:
    """A prompt with three pairs weighs three times one with a single pair: (3 * 1 + 0) / 4."""
    assert clustered([1, 1, 1, 0], [7, 7, 7, 3])[0] == 0.75
    assert clustered([1, 0], [7, 3], np.array([3.0, 1.0])) == (0.75, 0, 1)


def test_unanimous_outcomes_still_have_an_interval() -> None:
    """With win probability w, six wins of six happen with w^6: at 2.5 % that is w = 0.5407."""
    won, lost = win_rate([1] * 6, range(6)), win_rate([0] * 6, range(6))
    assert (won.rate, won.high) == (1, 1)
    assert won.low**6 == pytest.approx(0.025)
    assert (lost.rate, lost.low) == (0, 0)
    assert (1 - lost.high) ** 6 == pytest.approx(0.025)
    tied = win_rate([0.5] * 6, range(6))
    assert (tied.rate, tied.low, tied.high, tied.p) == (0.5, 0.5, 0.5, 1.0)


def test_nothing_to_count_is_nan() -> None:
    found = win_rate([NAN, NAN], [0, 1])
    assert math.isnan(found.rate)
    assert math.isnan(found.low)
    assert (found.wins, found.losses, found.masked, found.p) == (0, 0, 2, 1.0)
    assert math.isnan(win_rate([1, 0.5], [0, 0]).low)  # one prompt has no spread to see
    assert change([NAN], [1.0], [0]).pairs == 0


def test_change_by_hand() -> None:
    found = change([1, 2, 3, NAN], [2, 2, 5, 1], [0, 0, 1, 1])
    assert found[:3] == (2, 3, 1)
    assert found.pairs == 3
    assert (found.low, found.high) == (0.5, 2)  # means of the prompts are 0.5 and 2


def test_spread_of_seeds_by_hand() -> None:
    """Squares around the prompts' means: (1 + 1) + (2^2 + 0 + 2^2) = 10, of 1 + 2 degrees of freedom."""
    assert spread_of_seeds([1, 3, 10, 12, 14, 99, NAN], [0, 0, 1, 1, 1, 2, 2]) == pytest.approx(math.sqrt(10 / 3))
    assert math.isnan(spread_of_seeds([1, 2], [0, 1]))
