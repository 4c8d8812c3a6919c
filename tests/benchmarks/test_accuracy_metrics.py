"""Accuracies equal what is counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.accuracy import metrics

NAN = math.nan
# Two equal margins of 0, three of 0.25 on both sides, labels of all kinds.
LABELS = np.array([1, 1, -1, 0, 0, -1])
MARGINS = np.array([0.5, -0.25, -0.25, 0, 0.25, 0])


def quantised(num=400, seed=0):
    """Labels with a fifth of ties, and margins in steps of 0.25 that know something of them."""
    rng = np.random.default_rng(seed)
    labels = rng.choice([1, -1, 0], num, p=[0.4, 0.4, 0.2])
    return labels, np.round((labels + rng.normal(size=num)) / 0.25) * 0.25


def test_without_ties():
    """Decided are rows 0 (right), 1 (wrong), 2 (right), 5 (equal scores)."""
    assert metrics.mean(metrics.without_ties(LABELS, MARGINS)) == 2 / 4
    assert metrics.mean(metrics.tie_aware(LABELS, MARGINS)) == 2.5 / 4


def test_threshold_that_can_be_had():
    """0: rows 0, 2 and 3 are right; 0.25: rows 0, 3 and 4; 0.5: rows 3 and 4. The smallest of the best is 0."""
    counts = [metrics.three_way(LABELS, MARGINS, size).sum() for size in (0, 0.25, 0.5)]
    assert counts == [3, 3, 2]
    assert metrics.best_threshold(LABELS, MARGINS) == 0


@pytest.mark.parametrize("seed", range(3))
def test_best_threshold_is_the_best_of_all(seed):
    labels, margins = quantised(seed=seed)

    def right(size):
        said = [0 if abs(m) <= size else math.copysign(1, m) for m in margins]
        return sum(s == h for s, h in zip(said, labels, strict=True))

    best = max(right(size) for size in [0, *np.abs(margins)])
    found = metrics.best_threshold(labels, margins)
    assert right(found) == best == metrics.three_way(labels, margins, found).sum()


def test_official_count_depends_on_the_order_of_rows():
    """Rows by |m|: 3 and 5, then 1, 2, 4 in their order. Right are 2 without ties, and 3 once row 3 is a tie. If row 4
    is made a tie before row 2 is, row 2 is still right: 4. No threshold does that."""
    assert metrics.official_ties(LABELS, MARGINS).sum() == 3
    order = [0, 4, 1, 2, 3, 5]
    assert metrics.official_ties(LABELS[order], MARGINS[order]).sum() == 4
    assert metrics.best_threshold(LABELS[order], MARGINS[order]) == 0


def test_official_count_never_tries_no_ties():
    labels, margins = [1, -1], [1.0, -1.0]
    assert metrics.mean(metrics.official_ties(labels, margins)) == 0.5  # one of them has to be a tie
    assert metrics.mean(metrics.three_way(labels, margins, metrics.best_threshold(labels, margins))) == 1


@pytest.mark.parametrize("seed", range(3))
def test_official_count_on_quantised_scores(seed):
    """The best number of ties, made one by one; it moves with the rows, what can be had does not."""
    labels, margins = quantised(120, seed)
    rng, official, realisable = np.random.default_rng(seed), set(), set()
    for _ in range(8):
        rows = rng.permutation(len(labels))
        h, m = labels[rows], margins[rows]
        order = sorted(range(len(h)), key=lambda i, m=m: abs(m[i]))
        tries = [sum(h[i] == 0 for i in order[:k]) + sum(h[i] * m[i] > 0 for i in order[k:]) for k in range(1, 121)]
        assert metrics.official_ties(h, m).sum() == max(tries)
        official.add(max(tries))
        realisable.add(metrics.three_way(h, m, metrics.best_threshold(h, m)).sum())
    assert len(realisable) == 1
    assert len(official) > 1
    assert min(official) >= min(realisable)  # whole groups of equal margins are among what it tries


def test_official_count_of_what_is_invalid():
    """The invalid label is wrong whether it is a tie or not; a NaN margin is wrong, and first in line it lets the count
    begin without ties: 2 of 3."""
    assert metrics.mean(metrics.official_without_ties([NAN, 1, 0], [1, 1, 1])) == 0.5
    assert metrics.mean(metrics.official_ties([NAN, 1], [1.0, 2.0])) == 0.5
    assert metrics.mean(metrics.official_ties([1, 1, -1], [NAN, 1.0, -1.0])) == 2 / 3
    assert metrics.mean(metrics.official_ties([0, 0], [NAN, 1.0])) == 0.5  # no tie without a margin


def test_no_score_is_wrong_and_no_label_does_not_count():
    labels, margins = [1, 0, 1, NAN, -1], [NAN, NAN, 1.0, 1.0, -2.0]
    assert metrics.mean(metrics.without_ties(labels, margins)) == 2 / 3
    assert metrics.mean(metrics.tie_aware(labels, margins)) == 2 / 3
    assert metrics.mean(metrics.three_way(labels, margins, 0)) == 2 / 4
    assert metrics.mean(metrics.ranked(labels, margins)) == 2 / 4
    assert metrics.mean(metrics.video_score_rule(labels, margins)) == 2 / 4
    assert metrics.best_threshold(labels, margins) == 0


def test_swapped_labels_are_the_other_way_round():
    labels, margins = quantised()
    margins = margins + 0.01  # so that none is 0
    right = metrics.mean(metrics.without_ties(labels, margins))
    assert right > 0.6
    assert metrics.mean(metrics.without_ties(-labels, margins)) == pytest.approx(1 - right, abs=1e-12)
    assert metrics.mean(metrics.without_ties(-labels, -margins)) == right


def test_threshold_of_the_other_half():
    """Best for p is 0.1, for q 0.3: p is all right with 0.3, of q the tie is not with 0.1."""
    labels, margins, prompts = [0, 1, 0, 1], [0.1, 0.5, 0.3, 0.5], ["p", "p", "q", "q"]
    correct, thresholds = metrics.held_out_ties(labels, margins, prompts)
    assert sorted(thresholds) == [0.1, 0.3]
    assert correct.tolist() == [1, 1, 0, 1]
    assert np.isnan(metrics.held_out_ties(labels, margins, ["p"] * 4)[0]).all()


def test_threshold_of_the_other_half_is_no_better_than_ones_own():
    labels, margins = quantised()
    prompts = [f"prompt {i // 4}" for i in range(len(labels))]
    held_out = metrics.mean(metrics.held_out_ties(labels, margins, prompts)[0])
    own = metrics.mean(metrics.three_way(labels, margins, metrics.best_threshold(labels, margins)))
    assert own - 0.05 < held_out <= own


def test_video_scores_rule():
    correct = metrics.video_score_rule([0, 0, 1, 1, -1], [0.49, -0.5, 0.01, -0.01, 0.0])
    assert correct.tolist() == [1, 0, 1, 0, 0]


def test_ranking():
    """Ranks 1 2 2: the pairs are 0 > 1, 0 > 2 and a tie. Scores 1 3 2 invert both; equal scores invert nothing, and
    would be the best of answers if they were not wrong."""
    labels = [1, 1, 0]
    assert metrics.mean(metrics.ranked(labels, [2, 1, -1])) == 1
    assert metrics.mean(metrics.ranked(labels, [-2, -1, 1])) == pytest.approx(1 / 3)
    assert metrics.mean(metrics.ranked(labels, [0, 0, 0])) == pytest.approx(1 / 3)


def test_mean_over_records():
    """Records a (1, 0) and b (1, and one that does not count): 3/4, not 2/3."""
    correct = np.array([1, 0, 1, NAN])
    assert metrics.mean(correct) == pytest.approx(2 / 3)
    assert metrics.mean(correct, metrics.per_record(correct, ["a", "a", "b", "b"])) == 3 / 4


def test_interval_counts_prompts_not_pairs():
    """60 of 100 right: 1.96 standard errors are 0.096; ten pairs a prompt say no more than one."""
    right = np.repeat([1.0, 0.0], [60, 40])
    prompts = [str(i) for i in range(100)]
    low, high = metrics.interval(right, prompts)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.6 * 0.4 / 100), rel=0.1)
    assert low < 0.6 < high
    assert metrics.interval(np.repeat(right, 10), np.repeat(prompts, 10)) == pytest.approx((low, high))
    assert metrics.interval(right, ["one"] * 100) == pytest.approx((NAN, NAN), nan_ok=True)


def test_interval_of_all_right():
    """Of 20 prompts without an error the share may be as low as x with x^20 = 0.025."""
    low, high = metrics.interval(np.ones(20), [str(i) for i in range(20)])
    assert low**20 == pytest.approx(0.025)
    assert high == 1
    assert metrics.interval(np.zeros(20), [str(i) for i in range(20)]) == pytest.approx((0, 1 - low))


def test_interval_of_a_difference():
    """Two rewards that are right together differ by nothing, surely; one that is right 0.2 more often by that."""
    prompts = [str(i) for i in range(100)]
    assert metrics.interval_of_change(np.zeros(100), prompts) == (0, 0)
    low, high = metrics.interval_of_change(np.repeat([1.0, 0.0], [20, 80]), prompts)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.2 * 0.8 / 100), rel=0.1)


def test_chance():
    """All ties where most pairs are, else none, and half of the decided ones."""
    assert metrics.chance_with_ties([0, 0, 0, 1, -1]) == 0.6
    assert metrics.chance_with_ties([0, 1, -1, 1, 1]) == 0.4
    assert metrics.chance_ranked([0, 1], np.ones(2)) == 0.75


def test_threshold_curve_ends_where_all_are_ties():
    labels, margins = quantised()
    curve = metrics.threshold_curve(labels, margins)
    assert curve[-1] == (100, pytest.approx(100 * np.mean(labels == 0)))
    best = metrics.three_way(labels, margins, metrics.best_threshold(labels, margins))
    assert max(y for _, y in curve) == pytest.approx(100 * metrics.mean(best))
