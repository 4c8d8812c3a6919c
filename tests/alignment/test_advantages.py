"""Advantages against hand arithmetic."""

import json
import math

import pytest
import torch

from alignment.advantages import (
    COMBINES,
    NO_SPREAD,
    STDS,
    RunningStd,
    best_and_worst,
    combined_advantages,
    compared_rewards,
    group_advantages,
    group_quasi_norm,
    group_statistics,
    spread_share,
)
from alignment.objectives import clipped_surrogate

GROUPS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
REWARDS = torch.tensor([1.0, 2.0, 3.0, 6.0, -0.5, 0.25, 0.75, 0.1])
NAN, INF = float("nan"), float("inf")


SECOND = torch.tensor([10.0, 40.0, 20.0, 30.0, 5.0, 5.0, 25.0, 5.0])  # another reward of the same samples
WEIGHTS = {"first": 2.0, "second": 0.5}


def advantages(rewards, groups=GROUPS, **options):
    options = {"running": 2.0, **options}
    return group_advantages(torch.as_tensor(rewards, dtype=torch.float32), groups, **options)


def combined(first=REWARDS, second=SECOND, weights=WEIGHTS, groups=GROUPS, **options):
    running = dict.fromkeys(["first", "second", "weighted sum"], 2.0)
    options = {"clamp": None, "running": running, **options}
    return combined_advantages({"first": first, "second": second}, weights, groups, **options)


def by_hand(values, std=None):
    """Float64 numbers of one group, centred and divided by their deviation or by a given one."""
    values = [float(v) for v in values]
    mean = sum(values) / len(values)
    std = std or math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))
    return [(v - mean) / std for v in values]


def test_hand_calculation():
    """Group 0: mean 3, deviations -2 -1 0 3, variance 14 / 4."""
    std = math.sqrt(14 / 4)
    assert advantages(REWARDS)[:4].tolist() == pytest.approx([-2 / std, -1 / std, 0, 3 / std], rel=1e-6)


def test_groups_have_mean_zero_and_unit_deviation():
    for rewards in (REWARDS, REWARDS * 1e-3 + 5):
        by_group = advantages(rewards).view(2, 4)
        assert by_group.mean(1).abs().max() < 1e-6
        torch.testing.assert_close(by_group.std(1, correction=0), torch.ones(2), rtol=1e-5, atol=0)


@pytest.mark.parametrize("std", STDS)
def test_order_of_samples_and_names_of_groups_do_not_matter(std):
    """The order in which processes are gathered is no part of the result."""
    order = torch.tensor([5, 0, 7, 2, 1, 6, 3, 4])
    expected = advantages(REWARDS, std=std)
    assert torch.equal(advantages(REWARDS[order], GROUPS[order], std=std), expected[order])
    assert torch.equal(advantages(REWARDS, 7 - 3 * GROUPS, std=std), expected)
    for combine in COMBINES:
        expected, weights = combined(combine=combine, std=std)
        found, same = combined(REWARDS[order], SECOND[order], groups=GROUPS[order], combine=combine, std=std)
        torch.testing.assert_close(found, expected[:, order], rtol=1e-6, atol=1e-7)
        assert torch.equal(same, weights)


@pytest.mark.parametrize("std", ["group", "global", "quasi"])
def test_scale_and_shift_change_nothing(std):
    """An additive 1e-4 in the denominator would fail at scale 1e-4."""
    plain = advantages(REWARDS, std=std)
    for scale in (1e-4, 1e4):
        torch.testing.assert_close(advantages(REWARDS * scale, std=std), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages(REWARDS + 3, std=std), plain, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(advantages(-REWARDS, std=std), -plain)


@pytest.mark.parametrize("std", ["none", "running"])
def test_where_the_scale_counts(std):
    plain = advantages(REWARDS, std=std)
    torch.testing.assert_close(advantages(REWARDS * 1.5, std=std), plain * 1.5)
    torch.testing.assert_close(advantages(REWARDS + 3, std=std), plain, rtol=1e-5, atol=1e-6)


def test_scale_of_one_group_counts_where_the_deviation_is_not_its_own():
    scaled = torch.cat([REWARDS[:4], REWARDS[4:] * 10])
    for std in ("group", "quasi"):
        torch.testing.assert_close(advantages(scaled, std=std), advantages(REWARDS, std=std))
    assert advantages(scaled, std="global")[:4].abs().max() < 0.6 * advantages(REWARDS, std="global")[:4].abs().max()


def test_quasi_norm():
    """Deviations -2 -1 0 3, and a group that only scatters: 4^(1 / 0.8) / 2 = 2 sqrt 2 for deviations of 1."""
    norm = (2**0.8 + 1 + 3**0.8) ** 1.25 / 2
    found = advantages(torch.cat([REWARDS[:4], torch.tensor([1.0, -1.0, -1.0, 1.0])]), std="quasi")
    assert found[:4].tolist() == pytest.approx([-2 / norm, -1 / norm, 0, 3 / norm], rel=1e-6)
    assert found[4:].tolist() == pytest.approx([x / math.sqrt(8) for x in (1, -1, -1, 1)], rel=1e-6)


def test_quasi_norm_of_two_is_the_standard_deviation():
    valid = torch.tensor([True] * 3 + [False] + [True] * 4)
    mean, std, _ = group_statistics(REWARDS, GROUPS, valid)
    centred = torch.where(valid, REWARDS.double() - mean, NAN)
    torch.testing.assert_close(group_quasi_norm(centred, GROUPS, valid, p=2.0), std)
    assert (group_quasi_norm(centred, GROUPS, valid) > std).all()


def test_quasi_norm_favours_groups_in_which_one_stands_out():
    """Under "group" the advantages of both have the same root mean square."""
    rewards = torch.tensor([0.0, 0, 0, 1, 0, 1, 0, 1])
    sizes = advantages(rewards, std="quasi").view(2, 4).square().mean(1)
    assert sizes[0] > 1.2 * sizes[1]
    assert sizes.max() < 1


def test_running_deviation():
    assert advantages(REWARDS, std="running", running=0.5)[:4].tolist() == [-4, -2, 0, 5]  # 3 / 0.5 is clamped
    with pytest.raises(ValueError, match="needs the running standard deviation"):
        advantages(REWARDS, std="running", running=None)


@pytest.mark.parametrize("std", STDS)
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


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("combine", COMBINES)
def test_nothing_to_compare(combine, std):
    """A group of one, one of equals, one in which a single member is valid, one in which none is."""
    groups = torch.tensor([0, 1, 1, 1, 2, 2, 3, 3, 4, 4])
    first = torch.tensor([3.0, 0.1, 0.1, 0.1, 1.0, NAN, NAN, INF, 1.0, 2.0])
    found, _ = combined(first, 2 * first, groups=groups, combine=combine, std=std)
    assert found[:, :8].abs().max() == 0
    assert found[:, 8:].abs().min() > 0
    nothing, _ = combined(first[:8], 2 * first[:8], groups=groups[:8], combine=combine, std=std)
    assert nothing.abs().max() == 0


@pytest.mark.parametrize("std", STDS)
@pytest.mark.parametrize("combine", COMBINES)
def test_advantages_of_every_group_add_up_to_zero(combine, std):
    holes = torch.tensor([1, 1, NAN, 1, 1, 1, 1, 1])
    found, _ = combined(REWARDS * holes, SECOND * holes.flip(0), combine=combine, std=std)
    assert found.abs().max() > 0.1
    assert found.view(-1, 2, 4).sum(2).abs().max() < 1e-5


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
    with pytest.raises(ValueError, match="expected one of group, global, none, quasi, running"):
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


def test_weighted_sum_of_rewards():
    total = 2 * REWARDS + 0.5 * SECOND
    found, weights = combined(combine="rewards")
    assert weights.tolist() == [1]
    assert found.tolist() == [pytest.approx([*by_hand(total[:4]), *by_hand(total[4:])], rel=1e-6)]
    scaled, _ = combined(second=100 * SECOND, combine="rewards")
    assert (scaled - found).abs().max() > 0.5  # the larger reward takes over


def test_weighted_sum_of_advantages():
    expected = [
        2 * a + 0.5 * b
        for part in (slice(4), slice(4, 8))
        for a, b in zip(by_hand(REWARDS[part]), by_hand(SECOND[part]), strict=True)
    ]
    for second in (SECOND, 100 * SECOND - 7):
        found, weights = combined(second=second, combine="advantages")
        assert found.tolist() == [pytest.approx(expected, rel=1e-5)]
        assert weights.tolist() == [1]


def test_gdpo_normalises_the_sum_over_all_samples():
    """By the letter: the mean over the batch is subtracted, which changes nothing."""
    summed, _ = combined(combine="advantages")
    found, weights = combined(combine="gdpo")
    assert found.tolist() == [pytest.approx(by_hand(summed[0]), rel=1e-5)]
    assert weights.tolist() == [1]
    more, _ = combined(weights={"first": 20.0, "second": 5.0}, combine="gdpo")
    torch.testing.assert_close(more, found)


def test_gdpo_leaves_out_samples_without_any_reward():
    first, second = REWARDS.clone(), SECOND.clone()
    first[[3, 6]] = NAN
    second[3] = INF
    summed, _ = combined(first, second, combine="advantages")
    found, _ = combined(first, second, combine="gdpo")
    rest = [0, 1, 2, 4, 5, 6, 7]
    assert found[0, 3] == 0
    assert found[0, rest].tolist() == pytest.approx(by_hand(summed[0, rest]), rel=1e-5)


def test_gdpo_makes_no_preference_out_of_nothing():
    flat = torch.cat([REWARDS[:4], torch.full((4,), 0.3)])
    found, _ = combined(flat, 3 * flat, combine="gdpo")
    assert found[0, 4:].tolist() == [0] * 4
    assert found.square().mean() == pytest.approx(1, rel=1e-6)
    opposed, _ = combined(REWARDS / 3, -REWARDS, weights={"first": 0.7, "second": 0.7}, combine="gdpo")
    assert opposed.abs().max() == 0


def test_a_reward_that_is_missing_somewhere():
    """It takes the sample's sum of rewards with it, but not its advantage by the other reward."""
    first = REWARDS.clone()
    first[1] = NAN
    sums, _ = combined(first, combine="rewards")
    total = 2 * REWARDS + 0.5 * SECOND
    assert sums[0, 1] == 0
    assert sums[0, [0, 2, 3]].tolist() == pytest.approx(by_hand(total[[0, 2, 3]]), rel=1e-6)
    found, _ = combined(first, combine="advantages")
    a, b = by_hand(first[[0, 2, 3]]), by_hand(SECOND[:4])
    expected = [2 * a[0] + 0.5 * b[0], 0.5 * b[1], 2 * a[1] + 0.5 * b[2], 2 * a[2] + 0.5 * b[3]]
    assert found[0, :4].tolist() == pytest.approx(expected, rel=1e-6)


def loss_and_gradient(log_ratio, advantages, weights):
    log_ratio = log_ratio.clone().requires_grad_()
    losses = weights.double() @ clipped_surrogate(log_ratio, advantages, 0.1)
    return losses.detach(), torch.autograd.grad(losses.sum(), log_ratio)[0]


def test_separate_losses():
    """They equal the loss of the summed advantages, except for clipped samples on which the rewards disagree."""
    separate, weights = combined(combine="losses")
    summed, _ = combined(combine="advantages")
    assert separate.shape == (2, 8)
    assert weights.tolist() == [2, 0.5]
    assert separate[1, 4:].tolist() == pytest.approx(by_hand(SECOND[4:]), rel=1e-6)
    disagree = separate[0] * separate[1] < 0
    assert disagree.tolist() == [False, True, False, False, False, True, False, False]
    for log_ratio in (torch.full((8,), 0.3).double(), torch.full((8,), -0.3).double()):
        loss, gradient = loss_and_gradient(log_ratio, separate, weights)
        other_loss, other_gradient = loss_and_gradient(log_ratio, summed, torch.ones(1))
        for found, other in ((loss, other_loss), (gradient, other_gradient)):
            torch.testing.assert_close(found[~disagree], other[~disagree], rtol=1e-5, atol=1e-6)
            assert (found - other)[disagree].abs().min() > 0.01
    within = torch.linspace(-0.09, 0.09, 8).double()
    for found, other in zip(
        loss_and_gradient(within, separate, weights), loss_and_gradient(within, summed, torch.ones(1)), strict=True
    ):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("combine", COMBINES)
def test_negative_weights_turn_a_reward_around(combine):
    found = combined(weights={"first": 2.0, "second": -0.5}, combine=combine)
    expected = combined(second=-SECOND, combine=combine)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("combine", COMBINES)
def test_one_reward_alone(combine):
    """All ways agree, and rewards without a weight do not count."""
    found, weights = combined(second=SECOND * NAN, weights={"first": 1.0}, combine=combine)
    torch.testing.assert_close(found, advantages(REWARDS)[None])
    assert weights.tolist() == [1]


def test_clamp_bounds_what_is_returned():
    """In a group of 64 one stands out by sqrt 63 deviations; with "losses" each reward's advantage is bounded."""
    rewards, groups = torch.tensor([0.0] * 63 + [1.0]), torch.zeros(64, dtype=torch.int64)
    for combine in COMBINES:
        found, _ = combined(rewards, rewards, groups=groups, combine=combine, clamp=3.0)
        assert found[:, -1].tolist() == [3] * len(found)


def test_unknown_combination():
    with pytest.raises(ValueError, match="expected one of rewards, advantages, gdpo, losses"):
        combined(combine="sum")


def test_running_deviation_by_hand():
    """Moving averages of the first two moments, m and q: the deviation is sqrt(q - m^2)."""
    running = RunningStd(decay=0.75)
    batches = [[1.0, 3.0], [2.0, 2.0, 8.0], [0.0, -4.0]]
    means, squares = [2.0, 4.0, -2.0], [5.0, 24.0, 8.0]
    m, q = means[0], squares[0]
    for batch, mean, square in zip(batches, means, squares, strict=True):
        m, q = 0.75 * m + 0.25 * mean, 0.75 * q + 0.25 * square
        found = running.update({"r": torch.tensor(batch)})
        assert found == {"r": pytest.approx(math.sqrt(q - m * m), rel=1e-12)}
        assert running.state()["r"]["mean"] == pytest.approx(m, rel=1e-12)
    assert RunningStd(decay=0.0, state=running.state()).update({"r": torch.tensor([5.0, 9.0])}) == {"r": 2.0}


def test_running_deviation_keeps_its_digits():
    """1e8 and a spread of 1: the difference of moments would leave nothing of it."""
    batch = {"r": 1e8 + torch.tensor([1.0, -1.0], dtype=torch.float64)}
    running = RunningStd()
    assert [running.update(batch)["r"] for _ in range(3)] == pytest.approx([1.0] * 3, rel=1e-7)


def test_running_deviation_goes_on_from_a_checkpoint():
    batches = [{"a": REWARDS, "b": SECOND}, {"a": SECOND, "b": REWARDS}, {"a": REWARDS, "b": SECOND}]
    alone = RunningStd()
    for batch in batches[:2]:
        alone.update(batch)
    resumed = RunningStd(state=json.loads(json.dumps(alone.state())))
    assert resumed.update(batches[2]) == alone.update(batches[2])


def test_running_deviation_of_valid_rewards():
    running, clean = RunningStd(), RunningStd()
    holes = torch.tensor([NAN, 1.0, INF, 5.0])
    assert running.update({"a": holes, "b": holes * NAN}) == pytest.approx({"a": 2.0, "b": NAN}, nan_ok=True)
    clean.update({"a": holes[[1, 3]]})
    assert running.state() == clean.state()
    assert running.update({"a": holes * NAN}) == {"a": 2.0}
    found, _ = combined(second=SECOND * NAN, combine="losses", std="running", running={"first": 2.0, "second": NAN})
    assert found[1].tolist() == [0] * 8
    assert found[0, :4].tolist() == [-1, -0.5, 0, 1.5]


@pytest.mark.parametrize("combine", COMBINES)
def test_running_deviations_are_those_of_the_compared_rewards(combine):
    """In the first iteration they are the deviations over all samples."""
    rewards = {"first": REWARDS, "second": SECOND, "held out": SECOND * NAN}
    parts, _ = compared_rewards(rewards, WEIGHTS, combine)
    found = combined(combine=combine, std="running", running=RunningStd().update(parts))
    torch.testing.assert_close(found, combined(combine=combine, std="global"))


def test_best_and_worst():
    scores = torch.tensor([0.3, 0.9, 0.1, 0.5, 0.7, 5.0, 1.0, 3.0, 2.0, 4.0])
    groups = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, 0, 0])
    chosen = [best_and_worst(scores, groups, keep).nonzero().flatten().tolist() for keep in (1, 2, 3, 4, 5)]
    assert chosen == [[1, 5], [1, 2, 5, 6], [1, 2, 4, 5, 6, 9], [0, 1, 2, 4, 5, 6, 8, 9], list(range(10))]
    for keep in (0, 6):
        with pytest.raises(ValueError, match=f"keep is {keep}, but the smallest group has 5 members"):
            best_and_worst(scores, groups, keep)
    with pytest.raises(ValueError, match="keep is 3, but the smallest group has 2 members"):
        best_and_worst(scores, torch.tensor([0] * 8 + [2] * 2), 3)


def test_best_and_worst_among_equals():
    groups = torch.zeros(6, dtype=torch.int64)
    assert best_and_worst(torch.zeros(6), groups, 3).nonzero().flatten().tolist() == [0, 1, 5]
    tied = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 1.0])
    assert best_and_worst(tied, groups, 4).nonzero().flatten().tolist() == [1, 2, 3, 5]


def test_best_and_worst_prefers_valid_scores():
    groups = torch.zeros(6, dtype=torch.int64)
    scores = torch.tensor([NAN, 3.0, 1.0, INF, 2.0, NAN])
    assert best_and_worst(scores, groups, 2).nonzero().flatten().tolist() == [1, 2]
    assert best_and_worst(scores, groups, 3).nonzero().flatten().tolist() == [1, 2, 4]
    assert best_and_worst(scores, groups, 4).nonzero().flatten().tolist() == [0, 1, 2, 4]
    assert best_and_worst(scores * NAN, groups, 4).sum() == 4


def test_best_and_worst_against_sorting():
    """Groups dealt at random, with ties and invalid scores: as many of each, and those that a sort finds."""
    draw = torch.Generator().manual_seed(0)
    for _ in range(50):
        groups = torch.arange(4).repeat(7)[torch.randperm(28, generator=draw)]
        scores = torch.randint(0, 8, (28,), generator=draw).float()
        scores[torch.rand(28, generator=draw) < 0.4] = NAN
        keep = int(torch.randint(1, 8, (1,), generator=draw))
        chosen = best_and_worst(scores, groups, keep)
        for group in range(4):
            members = (groups == group).nonzero().flatten().tolist()
            valid = sorted((i for i in members if not scores[i].isnan()), key=lambda i: -float(scores[i]))
            spare = [i for i in members if scores[i].isnan()]
            middle = len(valid) - keep
            top = math.ceil(keep / 2)
            expected = valid[:top] + valid[top + middle :] if middle >= 0 else valid + spare[:-middle]
            assert sorted(expected) == [i for i in members if chosen[i]]


def test_share_of_the_spread_within_groups():
    """Deviations -1 1 and -2 2 about means of 0 and 4: 2.5 within, 6.5 in all."""
    rewards, groups = torch.tensor([-1.0, 1.0, 2.0, 6.0]), torch.tensor([0, 0, 1, 1])
    assert spread_share(rewards, groups) == pytest.approx(2.5 / 6.5, rel=1e-6)
    assert spread_share(rewards * 7 - 3, groups) == pytest.approx(2.5 / 6.5, rel=1e-6)
    holes = torch.tensor([NAN, -1.0, 1.0, INF, 2.0, 6.0])
    assert spread_share(holes, torch.tensor([0, 0, 0, 0, 1, 1])) == pytest.approx(2.5 / 6.5, rel=1e-6)
    assert spread_share(torch.tensor([1.0, 1.0, 3.0, 3.0]), groups) == 0
    assert spread_share(torch.tensor([-1.0, 1.0, -2.0, 2.0]), groups) == pytest.approx(1)
    assert math.isnan(spread_share(torch.full((4,), 0.1), groups))
    assert math.isnan(spread_share(torch.full((4,), NAN), groups))
    uneven = torch.tensor([0.0, 2.0, 4.0, 9.0]), torch.tensor([0, 0, 0, 1])  # 8 of 44.75: samples count alike
    assert spread_share(*uneven) == pytest.approx(8 / 44.75, rel=1e-6)


def test_share_of_the_spread_where_prompts_make_no_difference():
    rewards = torch.randn(4000, generator=torch.Generator().manual_seed(0))
    assert spread_share(rewards, torch.arange(1000).repeat(4)) == pytest.approx(0.75, abs=0.02)
