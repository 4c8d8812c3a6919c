"""Levels, and weights and betas that come from scores, against hand arithmetic."""

import math
from statistics import NormalDist

import pytest
import torch

from alignment.preference_losses import (
    dpo_loss,
    draw_levels,
    gap_beta,
    gap_weight,
    reward_weights,
)
from tests.alignment.linear_pairs import (
    POLICY,
    WINNERS,
    P,
    gradient,
    leaf,
    margins,
    own_error,
)


def test_gap_weight_by_hand():
    winners, losers = torch.tensor([1.0, 0.5, 0.8, 0.3]), torch.tensor([0.0, 0.0, 0.6, 0.3])
    expected = [1, math.sqrt(2) - 1, 2**0.8 - 2**0.6, 0]
    assert gap_weight(winners, losers).tolist() == pytest.approx(expected, abs=1e-7)
    assert gap_weight(winners, losers, base=9.0)[:2].tolist() == pytest.approx([8, 2])
    assert gap_weight(torch.tensor([1.0]), torch.tensor([0.9])) > 0  # 10 and 9 of 10, of which "9" is the larger text
    assert not gap_weight(leaf(winners), leaf(losers)).requires_grad


@pytest.mark.parametrize(
    ("winner", "loser"), [(0.3, 0.31), (80.0, 60.0), (0.5, -0.1), (math.nan, 0.1), (0.5, math.nan)]
)
def test_scores_out_of_order_or_range_are_refused(winner, loser):
    with pytest.raises(ValueError, match="0 <= loser <= winner <= 1"):
        gap_weight(torch.tensor([1.0, winner]), torch.tensor([0.0, loser]))


def test_gap_weights_are_applied_before_the_mean():
    winners = torch.tensor([1.0, 0.9, 0.8, 0.5, 0.2], dtype=torch.float64)
    weights, losses = gap_weight(winners, torch.full_like(winners, 0.2)), dpo_loss(margins(POLICY))
    expected = sum((2 ** float(w) - 2**0.2) * float(x) for w, x in zip(winners, losses, strict=True)) / P
    assert (weights * losses).mean().item() == pytest.approx(expected, rel=1e-6)
    assert abs((weights * losses.mean()).mean() - expected) > 1e-2
    assert torch.equal(gap_weight(torch.ones(P), torch.zeros(P)) * losses, losses)
    found = gradient(lambda theta: (weights * dpo_loss(margins(theta)))[-1], POLICY)  # no gap
    assert found.abs().max() < 1e-7


def test_gap_beta():
    """2 sigmoid(ln 3) - 1 = 1/2; the cosine is 1, 3/4, 1/2 and in its first quarter 3/4 + sqrt(1/2) / 4."""
    gap = torch.tensor([0.0, math.log(3), 100.0], dtype=torch.float64)
    assert gap_beta(gap, 0.0).tolist() == pytest.approx([0, 0.5, 1])
    assert gap_beta(gap, 0.25).tolist() == pytest.approx([0, 0.375 + math.sqrt(0.5) / 8, 0.75 + math.sqrt(0.5) / 4])
    assert gap_beta(gap, 0.5).tolist() == pytest.approx([0, 0.375, 0.75])
    assert gap_beta(gap, 1.0).tolist() == pytest.approx([0, 0.25, 0.5])
    assert not gap_beta(leaf(gap), 0.0).requires_grad
    with pytest.raises(ValueError, match="0 or more"):
        gap_beta(torch.tensor([0.1, -0.1]), 0.0)


GROUPS = torch.tensor([0, 0, 1, 1, 1, 2, 2])
REWARDS = torch.tensor([3.0, 1.0, 10.0, 10.0, 10.0, -100.0, 100.0])


def test_reward_weights_by_hand():
    """z is 1, -1; 0, 0, 0; -1, 1: weights e, 1/e, 1, ... over their mean."""
    raw = [math.e, 1 / math.e, 1, 1, 1, 1 / math.e, math.e]
    expected = [w / (sum(raw) / 7) for w in raw]
    assert reward_weights(REWARDS, GROUPS, 1.0, math.inf).tolist() == pytest.approx(expected)
    clipped = reward_weights(REWARDS, GROUPS, 1.0, 1.5)
    assert clipped.tolist() == pytest.approx([min(w, 1.5) for w in expected])
    assert expected[0] > 1.5 > expected[2]  # exp(r - max) is 1 at most: a bound before the mean is none
    cooler = [1 / (1 + math.exp(-4)) * 2, 2 / (1 + math.exp(4))]
    assert reward_weights(REWARDS[:2], GROUPS[:2], 0.5, 9.0).tolist() == pytest.approx(cooler)
    three = reward_weights(torch.tensor([0.0, 1.0, 2.0]), torch.zeros(3).long(), 1.0, 9.0)  # z: -+sqrt(3/2) and 0
    assert (three[2] / three[1]).item() == pytest.approx(math.exp(math.sqrt(1.5)))


def test_rewards_that_say_nothing_are_supervised_training():
    errors = own_error(POLICY, WINNERS)
    constant = reward_weights(torch.full((P,), 7.3), torch.tensor([0, 0, 1, 1, 1]), 0.1, 2.0)
    assert constant.tolist() == [1] * P
    assert torch.equal((constant * errors).mean(), errors.mean())
    assert reward_weights(REWARDS, GROUPS, 1e9, 2.0).tolist() == pytest.approx([1] * 7)


def test_reward_weights_do_not_know_scale_and_origin():
    weights = reward_weights(REWARDS.double(), GROUPS, 0.7, 5.0)
    moved = REWARDS.double() * torch.tensor([3.0, 0.1, 40.0])[GROUPS] + torch.tensor([-8.0, 5.0, 100.0])[GROUPS]
    torch.testing.assert_close(reward_weights(moved, GROUPS, 0.7, 5.0), weights)
    shuffled = torch.tensor([6, 2, 0, 4, 5, 3, 1])
    torch.testing.assert_close(reward_weights(REWARDS[shuffled], GROUPS[shuffled], 0.7, 5.0), weights[shuffled])
    assert (weights > 0).all()
    assert not reward_weights(leaf(REWARDS), GROUPS, 0.7, 5.0).requires_grad


def test_reward_weights_at_the_ends():
    rewards, groups = torch.tensor([1.0, 4.0, 2.0]), torch.zeros(3).long()
    assert reward_weights(rewards, groups, 1e-4, math.inf).tolist() == pytest.approx([0, 3, 0])  # the best, no overflow
    with pytest.raises(ValueError, match="finite"):
        reward_weights(torch.tensor([1.0, math.nan]), groups[:2], 1.0, 2.0)


@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_a_level_depends_on_its_seed_alone(law):
    levels = draw_levels(law, [5, 2**62, 7])
    torch.manual_seed(3)
    assert draw_levels(law, [7, 5]) == [levels[2], levels[0]]
    assert len(set(levels)) == 3


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize(
    ("law", "quantile"),
    [("uniform", lambda q: q), ("logit_normal", lambda q: 1 / (1 + math.exp(-NormalDist().inv_cdf(q))))],
)
def test_laws_of_the_levels(law, quantile, shift):
    """4000 draws: an empirical quantile has a standard error of 0.008 in probability. The shift keeps the order."""
    levels = sorted(draw_levels(law, range(4000), shift))
    assert levels[0] > 0
    assert levels[-1] <= 1
    for q in (0.1, 0.25, 0.5, 0.75, 0.9):
        low, high = (quantile(q + d) for d in (-0.03, 0.03))
        low, high = (shift * t / (1 - t + shift * t) for t in (low, high))
        assert low < levels[int(q * 4000)] < high


def test_shift_and_unknown_law():
    plain, shifted = draw_levels("uniform", [1, 2, 3]), draw_levels("uniform", [1, 2, 3], 5.0)
    assert shifted == pytest.approx([5 * t / (1 + 4 * t) for t in plain])
    with pytest.raises(ValueError, match="'normal', expected one of uniform, logit_normal"):
        draw_levels("normal", [1])


def test_levels_of_1_and_hardly_0_are_within_range(monkeypatch):
    for drawn in (0.0, 1 - 2**-53):
        monkeypatch.setattr(torch, "rand", lambda *a, drawn=drawn, **k: torch.tensor(drawn, dtype=torch.float64))
        (level,) = draw_levels("uniform", [0], 3.0)
        assert 0 < level <= 1
