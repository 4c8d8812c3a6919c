"""The clipped surrogate against hand arithmetic and autograd."""

import math

import pytest
import torch

from alignment.objectives import bradley_terry_with_ties, clipped_surrogate, is_clipped

CLIP = 0.1


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [  # loss = max(-A r, -A clip(r)); slope = d loss / d log r, which is -A r where the clip does not bind
        (1.0, 2.0, -2.0, -2.0),
        (1.0, -2.0, 2.0, 2.0),
        (1.05, 2.0, -2.1, -2.1),
        (1.2, 2.0, -2.2, 0.0),  # has gained enough
        (1.2, -2.0, 2.4, 2.4),  # went the wrong way: still pulled back
        (0.8, 2.0, -1.6, -1.6),  # went the wrong way
        (0.8, -2.0, 1.8, 0.0),  # has lost enough
        (1.2, 0.0, 0.0, 0.0),
    ],
)
def test_truth_table(ratio, advantage, loss, slope):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value = clipped_surrogate(log_ratio, torch.tensor([advantage]), CLIP)
    assert value.item() == pytest.approx(loss, rel=1e-12)
    value.sum().backward()
    assert log_ratio.grad.item() == pytest.approx(slope, rel=1e-12)
    expected = slope == 0 and advantage != 0
    assert is_clipped(log_ratio, torch.tensor([advantage]), CLIP).tolist() == [expected]


def test_at_ratio_one_it_is_reinforce():
    """The gradient is -A grad log p, whatever the clip."""
    draw = torch.Generator().manual_seed(0)
    log_prob = torch.randn(6, generator=draw, dtype=torch.float64, requires_grad=True)
    advantage = torch.randn(6, generator=draw)
    for clip in (1e-4, 0.2, 10.0):
        (gradient,) = torch.autograd.grad(
            clipped_surrogate(log_prob - log_prob.detach(), advantage, clip).sum(), log_prob
        )
        torch.testing.assert_close(gradient, -advantage.double())


def test_clips_of_published_size_are_resolved():
    """Clips of 1e-4 and drifts of 1e-7 need the float64 that log_ratio comes in."""
    advantage = torch.ones(2)
    log_ratio = math.log(1 + 1e-4) + torch.tensor([-1e-9, 1e-9], dtype=torch.float64)
    assert is_clipped(log_ratio, advantage, 1e-4).tolist() == [False, True]
    tiny = torch.tensor([0.0, 1e-9], dtype=torch.float64)
    losses = clipped_surrogate(tiny, advantage, 1e-4)
    assert float(losses[0] - losses[1]) == pytest.approx(1e-9, rel=1e-3)


@pytest.mark.parametrize("theta", [1.5, 5.0])
def test_the_three_outcomes_of_a_comparison_are_all_there_are(theta):
    difference = torch.linspace(-6, 6, 25, dtype=torch.float64)
    shares = [(-bradley_terry_with_ties(difference, torch.tensor(label), theta)).exp() for label in (1, -1, 0)]
    torch.testing.assert_close(sum(shares), torch.ones_like(difference))
    # Rao and Kupper (1967): P(first) = pi_1 / (pi_1 + theta pi_2) with pi = exp(score)
    torch.testing.assert_close(shares[0], difference.exp() / (difference.exp() + theta))
    torch.testing.assert_close(shares[1], 1 / (1 + theta * difference.exp()))


def test_a_tie_pulls_scores_together_and_a_preference_apart():
    for label, sign in ((1, -1), (-1, 1)):
        difference = torch.zeros((), requires_grad=True)
        bradley_terry_with_ties(difference, torch.tensor(label)).backward()
        assert difference.grad * sign == pytest.approx(5 / 6)  # 1 - sigmoid(-ln 5)
    difference = torch.tensor([-2.0, 0.0, 2.0], requires_grad=True)
    bradley_terry_with_ties(difference, torch.zeros(3)).sum().backward()
    assert difference.grad[0] < 0 == difference.grad[1] < difference.grad[2]
