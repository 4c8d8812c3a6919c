"""Gains: paired statistics and the split of a gain by validity, against hand arithmetic."""

import math
import random

import pytest

from alignment.gains import compare, decompose, first_and_last, interval, number, paired, peak, percent, summary


def scores(
    iteration: int, motion: list, valid: list | None = None, area: list | None = None, shape: list | None = None
):
    """An evaluation that trains on motion and holds out shape."""
    values = {"reward/mean": motion, "reward/motion": motion, "reward/motion/valid": valid, "reward/motion/area": area}
    return {
        "iteration": iteration,
        "prompts": [f"prompt {i}" for i in range(len(motion))],
        "seeds": list(range(len(motion))),
        "values": {key: column for key, column in (values | {"reward/shape": shape}).items() if column is not None},
        "trained": {"motion": 1.0},
        "held_out": ["shape"],
    }


def test_paired_by_hand():
    """Changes 1, 2, 3: mean 2, variance 1, standard error 1 / sqrt 3, z 2 sqrt 3."""
    change = paired([1, 2, 3, None, 5], [2, 4, 6, 9, math.nan])
    assert change[:3] == (2, 4, 2)
    assert change.stderr == pytest.approx(1 / math.sqrt(3))
    assert change.z == pytest.approx(2 * math.sqrt(3))
    assert change.num == 3


def test_paired_removes_the_spread_between_prompts():
    """Changes 0.9 and 1.1: standard error 0.1 although the prompts are 100 apart."""
    assert paired([0, 100], [0.9, 101.1]).stderr == pytest.approx(0.1)


def test_paired_edges():
    assert paired([1, 2], [1, 2])[2:] == (0, 0, 0, 2, 0, 0)
    assert paired([1, 2], [2, 3]).z == math.inf
    assert paired([2, 3], [1, 2]).z == -math.inf
    assert paired([1, 2], [1 + 5e-7, 2 + 6e-7]).z == 0  # rounding has no spread
    assert paired([1, 2], [1 - 3e-6, 2 - 3e-6]).z < -1e3
    single, none = paired([1], [2]), paired([None], [1])
    assert single.change == 1
    assert math.isnan(single.stderr)
    assert math.isnan(single.z)
    assert math.isnan(single.low)
    assert none.num == 0
    assert math.isnan(none.change)
    with pytest.raises(ValueError, match="equal lengths"):
        paired([1], [1, 2])


def test_interval_by_hand():
    """Of changes 0 and 1 a resample has the mean 0, 1/2 or 1 with probabilities 1/4, 1/2, 1/4: 2.5 % is 0, 97.5 % is 1.

    Of 199 zeros and a 1 a mean of 0 has probability (199/200)^200 = 0.37, one of k/200 and less about the Poisson
    probability of k events and less with mean 1: 0.981 for 3, 0.920 for 2.
    """
    assert interval([0, 1]) == (0, 1)
    assert interval([0] * 199 + [1]) == (0, 3 / 200)
    assert interval([5, 5, 5]) == pytest.approx((5, 5))
    assert paired([7, 7], [7, 8])[-2:] == (0, 1)


def test_interval_of_normal_values_is_that_of_the_standard_error():
    """1.96 standard errors to either side, where the spread is taken with n: sqrt(399/400) of the usual one."""
    draw = random.Random(0)
    for _ in range(5):
        values = [draw.gauss(3, 2) for _ in range(400)]
        change = paired([0.0] * 400, values)
        assert change.high - change.change == pytest.approx(1.96 * change.stderr, rel=0.1)
        assert change.change - change.low == pytest.approx(1.96 * change.stderr, rel=0.1)
    assert interval(values) == interval(values)


@pytest.mark.parametrize("skewed", [False, True])
def test_intervals_cover_the_true_mean(skewed):
    """Some 95 of 100, on either side as many as the other; one fewer where values are skewed, as percentiles do."""
    draw = random.Random(1)
    runs = 1500
    below = above = 0
    for _ in range(runs):
        low, high = interval([draw.expovariate(1) if skewed else draw.gauss(1, 1) for _ in range(100)])
        below += high < 1
        above += low > 1
    assert (below + above) / runs == pytest.approx(0.06 if skewed else 0.05, abs=0.017)
    if not skewed:
        assert below / runs == pytest.approx(above / runs, abs=0.015)


def test_peak_is_the_first_best_mean():
    evaluations = [scores(0, [1, 1]), scores(5, [None, 4]), scores(10, [4, 4]), scores(15, [None, None])]
    assert peak(evaluations) == (5, 4)
    assert peak(evaluations[3:]) is None
    assert peak([]) is None


def test_decomposition_by_hand():
    """P .5 -> .75, E .4 -> .6: the mean goes .2 -> .45; validity .25 * .5 = .125, quality .625 * .2 = .125.

    Valid both times are the first two prompts: .2 -> .6 and .6 -> .8, so +.3 +- .1.
    """
    before = scores(0, [0.2, 0.6, 0, 0], [1, 1, 0, 0], area=[10, 30, 0, 0])
    after = scores(1, [0.6, 0.8, 0.4, 0], [1, 1, 1, 0], area=[20, 30, 99, 0])
    gain = decompose(before, after, "motion")
    assert gain.total.change == pytest.approx(0.25)
    assert (gain.validity.before, gain.validity.after) == (0.5, 0.75)
    assert (gain.given_valid_before, gain.given_valid_after) == pytest.approx((0.4, 0.6))
    assert gain.from_validity == pytest.approx(0.125)
    assert gain.from_quality == pytest.approx(0.125)
    assert gain.both_valid.change == pytest.approx(0.3)
    assert gain.both_valid.stderr == pytest.approx(0.1)
    assert gain.both_valid.z == pytest.approx(3)
    assert gain.area_ratio == pytest.approx(1.25)


@pytest.mark.parametrize("seed", range(20))
def test_decomposition_is_an_identity(seed):
    """Also with missing values, with no valid clip on one side, and with none at all."""
    draw = random.Random(seed)
    pair = []
    for share in (draw.choice([0, 0.3, 0.8, 1]), draw.choice([0, 0.5, 1])):
        valid = [float(draw.random() < share) for _ in range(30)]
        reward = [v * draw.gauss(1, 1) for v in valid]
        pair.append(scores(seed, [None if draw.random() < 0.1 else r for r in reward], valid))
    gain = decompose(*pair, "motion")
    assert gain.from_validity + gain.from_quality == pytest.approx(gain.total.change, abs=1e-12)


def test_no_split_where_invalid_clips_score():
    gain = decompose(scores(0, [0.5, 0.3], [1, 0]), scores(1, [0.6, 0.2], [1, 0]), "motion")
    assert gain.from_validity is None
    assert gain.from_quality is None
    assert gain.both_valid.change == pytest.approx(0.1)


def test_decompose_needs_validity():
    assert decompose(scores(0, [0.5]), scores(1, [0.6]), "motion") is None
    assert decompose(scores(0, [None], [1]), scores(1, [0.6], [1]), "motion") is None


def test_only_the_same_prompts_are_compared():
    before, after = scores(0, [1, 2]), scores(1, [2, 3])
    assert first_and_last([before, after])
    assert first_and_last([before]) is None
    after["seeds"] = [7, 8]
    assert first_and_last([before, after]) is None
    with pytest.raises(ValueError, match="different prompts or seeds"):
        compare(before, after)


@pytest.mark.parametrize(
    ("value", "signed", "text"),
    [(0.27, True, "+0.270"), (0, True, "0"), (1234.5, False, "1,234"), (-1.5, True, "-1.50"), (0.0015, False, "0.0015")]
    + [(1e-5, False, "1e-05"), (math.nan, False, "n/a"), (None, False, "n/a"), (-math.inf, False, "-inf")],
)
def test_numbers_for_reading(value, signed, text):
    assert number(value, signed) == text


def test_summary_in_words():
    one = [1.0, 1.0, 1.0]
    pair = scores(0, [0.1, 0.2, 0.3], one, shape=[1, 1, 0]), scores(5, [0.2, 0.4, 0.6], one, shape=[1, 1, 1])
    words = " ".join(summary(pair))
    assert "Over 3 evaluation prompts" in words
    assert "the trained reward rose from 0.200 to 0.400: +0.200 +- 0.058 (z 3.5, 95 % +0.100 to +0.300)" in words
    assert "its whole change is quality" in words
    assert "Held out, never trained on: shape 0.667 to 1.00, +0.333 +- 0.333 (z 1.0, 95 % 0 to +1.00)" in words
    grown = [scores(0, [0.2, 0.6, 0, 0], [1, 1, 0, 0]), scores(1, [0.6, 0.8, 0.4, 0], [1, 1, 1, 0])]
    words = " ".join(summary(grown))
    assert "50% before, 75% after" in words
    assert "+0.125 comes from more or fewer valid clips and +0.125 from the quality" in words
    assert "On the 2 prompts valid both times: +0.300 +- 0.100 (z 3.0, 95 % +0.200 to +0.400)" in words
    assert "no gain can be stated" in summary([])[0]
    assert "within the noise" in summary([scores(0, [1, 2, 3]), scores(1, [2, 1, 3])])[0]
    assert percent(0.996) == "99.6%"


def test_summary_names_what_moved_inside_a_reward() -> None:
    """Speed moves by 1 +- 0.01, size by 1 +- 0.1, cosine by +-0.1: the clearest comes first, the last not at all."""
    before = {"prompts": list("abcd"), "seeds": [0, 1, 2, 3], "trained": {"motion": 1.0}, "held_out": []}
    after = dict(before)
    flat = {"size": [1.0] * 4, "speed": [1.0] * 4, "cosine": [0.5] * 4}
    moved = {"size": [2.0, 2.1, 1.9, 2.0], "speed": [2.0, 2.01, 1.99, 2.0], "cosine": [0.6, 0.4, 0.6, 0.4]}
    for side, dims in ((before, flat), (after, moved)):
        side["values"] = {"reward/motion": dims["size"]} | {f"reward/motion/{dim}": v for dim, v in dims.items()}
    inside = [s for s in summary([{"iteration": 0, **before}, {"iteration": 1, **after}]) if "made of" in s]
    assert len(inside) == 1
    assert 0 < inside[0].index("speed 1.00 to 2.00") < inside[0].index("size 1.00 to 2.00")
    assert "cosine" not in inside[0]
