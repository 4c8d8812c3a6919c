"""Advantages against hand arithmetic."""

import math

import pytest
import torch

from alignment.advantages import NO_SPREAD, group_advantages, group_statistics

GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
REWARDS = torch.tensor([1.0, 2.0, 3.0, 6.0, -0.5, 0.25, 0.75, 0.1])
NAN, INF = float("nan"), float("inf")


def advantages(rewards, groups=GROUPS, **options):
    return group_advantages(torch.as_tensor(rewards, dtype=torch.float32), groups, **options)


def test_hand_calculation():
    """Group 0: mean 3, deviations -2 -1 0 3, variance 14 / 4."""
    std = math.sqrt(14 / 4)
    assert advantages(REWARDS)[:4].tolist() == pytest.approx([-2 / std, -1 / std, 0, 3 / std], rel=1e-6)


def test_groups_have_mean_zero_and_unit_deviation():
    for rewards in (REWARDS, REWARDS * 1e-3 + 5):
        by_group = advantages(rewards).view(2, 4)
        assert by_group.mean(1).abs().max() < 1e-6
        torch.testing.assert_close(by_group.std(1, correction=0), torch.ones(2), rtol=1e-5, atol=0)


def test_order_of_samples_does_not_matter():
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    assert torch.equal(advantages(REWARDS[order], GROUPS[order]), advantages(REWARDS)[order])


@pytest.mark.parametrize("std", ["group", "global"])
def test_scale_and_shift_change_nothing(std):
    """An additive 1e-4 in the denominator would fail at scale 1e-4."""
    plain = advantages(REWARDS, std=std)
    for scale in (1e-4, 1e4):
        torch.testing.assert_close(advantages(REWARDS * scale, std=std), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages(REWARDS + 3, std=std), plain, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(advantages(-REWARDS, std=std), plain)


@pytest.mark.parametrize("std", ["group", "global", "none"])
def test_group_without_spread_has_no_preference(std):
    rewards = torch.cat([torch.full((4,), 0.1), REWARDS[4:]])
    found = advantages(rewards, std=std)
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert found[4:].abs().min() > 0
    assert advantages(torch.zeros(8), std=std).tolist() == [0] * 8


def test_spread_is_judged_by_the_magnitude():
    below = 1000.0 * (1 + 0.5 * NO_SPREAD * torch.tensor([1.0, -1.0], dtype=torch.float64))
    above = 1000.0 * (1 + 2 * NO_SPREAD * torch.tensor([1.0, -1.0], dtype=torch.float64))
    pair = torch.tensor([0, 0])
    assert group_advantages(below, pair).tolist() == [0, 0]
    assert group_advantages(above, pair).tolist() == pytest.approx([1, -1])
    assert group_advantages(1e-9 * torch.tensor([1.0, -1.0]), pair).tolist() == pytest.approx([1, -1])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_invalid_rewards_are_left_out(bad):
    rewards = REWARDS.clone()
    rewards[3] = bad
    found = advantages(rewards)
    alone = advantages(rewards[:3], GROUPS[:3])
    assert found[3] == 0
    torch.testing.assert_close(found[:3], alone)
    torch.testing.assert_close(found[4:], advantages(REWARDS)[4:])
    marked = advantages(REWARDS, valid=torch.tensor([True] * 3 + [False] + [True] * 4))
    torch.testing.assert_close(marked, found)


def test_single_valid_member_has_no_one_to_compare_with():
    found = advantages([1.0, NAN, NAN, NAN, *REWARDS[4:].tolist()])
    assert found[:4].tolist() == [0, 0, 0, 0]
    assert advantages([NAN] * 8).tolist() == [0] * 8


def test_one_deviation_for_all_or_none():
    centred = REWARDS - REWARDS.view(2, 4).mean(1).repeat_interleave(4)
    torch.testing.assert_close(advantages(REWARDS, std="none"), centred)
    torch.testing.assert_close(advantages(REWARDS, std="global"), centred / REWARDS.std(correction=0))
    masked = torch.cat([REWARDS, torch.tensor([NAN])])
    groups = torch.cat([GROUPS, torch.tensor([1])])
    torch.testing.assert_close(advantages(masked, groups, std="global")[:8], advantages(REWARDS, std="global"))
    with pytest.raises(ValueError, match="expected group, global or none"):
        advantages(REWARDS, std="batch")


def test_clamp():
    rewards, groups = torch.tensor([0.0] * 63 + [1.0]), torch.zeros(64, dtype=torch.int64)
    assert advantages(rewards, groups, clamp=None).max() == pytest.approx(math.sqrt(63), rel=1e-5)
    assert advantages(rewards, groups).max() == 5
    assert advantages(-rewards, groups, clamp=2.0).min() == -2


def test_statistics():
    mean, std, spread = group_statistics(REWARDS, GROUPS, torch.tensor([True, True, True, False] + [False] * 4))
    assert mean.tolist() == [2.0] * 4 + [0.0] * 4
    assert std.tolist() == pytest.approx([math.sqrt(2 / 3)] * 4 + [0.0] * 4)
    assert spread.tolist() == [True] * 4 + [False] * 4
