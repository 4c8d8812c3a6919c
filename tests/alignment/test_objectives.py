"""Losses against hand arithmetic, closed forms and autograd."""

import math

import pytest
import torch

from alignment.objectives import (
    adaptive_error,
    adaptive_log_prob,
    bradley_terry_with_ties,
    clipped_surrogate,
    divergence_masked_surrogate,
    is_clipped,
    leaves_trust_region,
    matching_log_prob,
    nft_decay,
    nft_loss,
    optimality,
    ramped_decay,
    soft_clip,
    velocity_divergence,
)

CLIP = 0.1


def draws(*shape, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def column(*values):
    """(B, 1) samples of one element."""
    return torch.tensor(values, dtype=torch.float64).view(-1, 1)


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


@pytest.mark.parametrize(
    ("ratio", "advantage", "divergence", "kept"),
    [  # limit 0.01: dropped at it and beyond, if the gradient leads away from ratio 1
        (1.2, 2.0, 0.009, True),
        (1.2, 2.0, 0.01, False),
        (1.2, 2.0, 0.5, False),
        (1.2, -2.0, 0.5, True),
        (0.8, -2.0, 0.009, True),
        (0.8, -2.0, 0.01, False),
        (0.8, 2.0, 0.5, True),
        (1.0, 2.0, 0.5, True),
        (1.0, -2.0, 0.5, True),
        (1.2, 0.0, 0.5, True),
    ],
)
def test_truth_table_of_the_divergence_mask(ratio, advantage, divergence, kept):
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    measured = torch.tensor([divergence], requires_grad=True)
    given = torch.tensor([advantage]), 0.01
    loss = divergence_masked_surrogate(log_ratio, measured, *given)
    expected = -advantage * ratio if kept else 0.0
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    loss.sum().backward()
    assert log_ratio.grad.item() == pytest.approx(expected, rel=1e-12)  # d exp(log r) = r d log r
    assert measured.grad is None
    assert leaves_trust_region(log_ratio, measured, *given).tolist() == [not kept]


def test_optimality():
    advantages = torch.tensor([-10.0, -5.0, -1.0, 0.0, 2.5, 5.0, 10.0])
    assert optimality(advantages).tolist() == pytest.approx([0, 0, 0.4, 0.5, 0.75, 1, 1])
    assert optimality(advantages, adv_clip=1.0).tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1, 1])


def test_nft_loss_by_hand():
    """x0 1, noise 3, level 1/2: x = 2. v 2, v_old 1, beta 1/2: v+ 1.5, v- 0.5; clean estimates 1.25 and 1.75, errors
    0.25 and 0.75, and an error's square over its size is the error: 5 (0.25 / 4 + 0.75 * 3 / 4) / 0.5 with r 1/4.
    Second sample: v 3 makes v+ 2 exact, v- 0, error 1."""
    loss = nft_loss(column(2, 3), column(1, 1), column(2, 2), column(1, 1), 0.5, torch.tensor([0.25, 0.25]), 0.5)
    assert loss.tolist() == pytest.approx([6.25, 7.5])


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_gradient_where_the_policy_is_the_old_one(beta):
    """(adv_clip / D) (2 r - 1) 2 t^2 (v_old - v*) / w, whatever beta, with w = mean |x0_hat - x0|."""
    old, noise, x0 = draws(4, 3, 5, count=3)
    level, r = torch.tensor([0.2, 0.5, 0.9, 1.0], dtype=torch.float64), torch.tensor([0.0, 0.3, 0.5, 1.0])
    t = level.view(4, 1, 1)
    v, old = old.clone().requires_grad_(), old.clone().requires_grad_()
    x = (1 - t) * x0 + t * noise
    nft_loss(v, old, x, x0, level, r, beta, adv_clip=4.0).sum().backward()
    off = (old - (noise - x0)).detach()
    w = (t * off).abs().mean((1, 2), keepdim=True)
    expected = 4.0 / 15 * (2 * r.view(4, 1, 1) - 1) * 2 * t**2 * off / w
    torch.testing.assert_close(v.grad, expected)
    assert v.grad[2].abs().max() < 1e-15  # r = 1/2 says nothing
    assert old.grad is None
    # r = 1: supervised training on x0, adv_clip |x0_hat - x0|^2 / w
    v = v.detach().requires_grad_()
    supervised = 4.0 * (x - t * v - x0).square().mean((1, 2)) / w.flatten()
    torch.testing.assert_close(torch.autograd.grad(supervised.sum(), v)[0][3], expected[3])


def test_nft_gradient_away_from_the_old_policy():
    """d/dv of r |x0+ - x0|^2 / w+ is r 2 t^2 beta (v+ - v*) / (w+ D), of the other term -(1 - r) 2 t^2 beta (v- - v*)
    / (w- D): the weights are constants."""
    v, old, noise, x0 = draws(1, 6, count=4, seed=1)
    t, r, beta = 0.6, torch.tensor([0.8], dtype=torch.float64), 0.3
    v.requires_grad_()
    nft_loss(v, old, (1 - t) * x0 + t * noise, x0, t, r, beta, adv_clip=1.0).sum().backward()
    good, bad = (beta * v + (1 - beta) * old - noise + x0), ((1 + beta) * old - beta * v - noise + x0)
    terms = [2 * t**2 * e / (t * e.abs().mean() * 6) for e in (good, bad)]
    torch.testing.assert_close(v.grad, 0.8 * terms[0] - 0.2 * terms[1])


def test_nft_weights_are_bounded_below():
    """An estimate that is off by 1e-7: 1e-14 / 1e-5, twice (r and 1 - r), over beta."""
    loss = nft_loss(column(1 + 1e-7), column(1 + 1e-7), column(2), column(1), 1.0, torch.ones(1), 0.5, adv_clip=1.0)
    assert loss.item() == pytest.approx(1e-9 / 0.5, rel=1e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_nft_optimum(beta):
    """Theorem 3.2: v_old + (2 / beta) E[r] (E[v* | good] - v_old), v_old the mean of v* at this x.

    The theorem is about the loss without weights. Here samples have two elements with targets m +- 100 and one velocity
    for both, so that the mean absolute error is 100 t for every sample and policy: the weights are all alike.
    """
    m, r = torch.tensor([0.5, -1.0, 2.0, 0.1]).double(), torch.tensor([1.0, 0.2, 0.7, 0.0]).double()
    target = torch.stack([m + 100, m - 100], 1)
    old, t = m.mean(), 0.4
    best = old + 2 / beta * r.mean() * ((r * m).sum() / r.sum() - old)

    def slope(value):
        v = value.clone().requires_grad_()
        x0 = torch.zeros_like(target)
        loss = nft_loss(v.expand(4, 2), old.expand(4, 2), t * target, x0, t, r, beta)
        return torch.autograd.grad(loss.mean(), v)[0].item()

    assert slope(best) == pytest.approx(0, abs=1e-12)
    assert slope(best - 0.1) < 0 < slope(best + 0.1)


def test_schedules_of_the_old_policy():
    assert [nft_decay(1, i) for i in (0, 1, 200, 500, 501)] == pytest.approx([0, 0.001, 0.2, 0.5, 0.5])
    assert [nft_decay(2, i) for i in (0, 74, 75)] == [0, 0, 0]
    assert [nft_decay(2, i) for i in (76, 175, 208, 209)] == pytest.approx([0.0075, 0.75, 0.9975, 0.999])
    assert [ramped_decay(i, 0.001, 0.3) for i in (0, 100, 400)] == pytest.approx([0, 0.1, 0.3])


def test_matching_log_prob_by_hand():
    """Targets noise - x0 are (2, -1); errors (1, 3) and (0, 1)."""
    velocity = torch.tensor([[3.0, 2.0], [2.0, 0.0]], requires_grad=True)
    noise, x0 = torch.tensor([[3.0, 1.0]] * 2), torch.tensor([[1.0, 2.0]] * 2)
    assert matching_log_prob(velocity, noise, x0).tolist() == [-5, -0.5]
    found = matching_log_prob(velocity, noise, x0, torch.tensor([0.5, 2.0]))
    assert found.dtype == torch.float64
    assert found.tolist() == [-2.5, -1]
    found.sum().backward()  # -w 2 (v - target) / D
    assert velocity.grad.tolist() == [[-0.5, -1.5], [0, -2]]


def test_adaptive_log_prob():
    """x0_hat - x0 = t (v* - v): the form is t mean(e^2) / mean |e| with e = v - v*, its gradient 2 t e / (D mean |e|)
    and 2 e / (D mean |e|) with respect to x0_hat, which sums up to 2 in absolute value."""
    velocity, noise, x0 = draws(3, 2, 4, count=3, seed=2)
    velocity.requires_grad_()
    level = torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)
    t = level.view(3, 1, 1)
    x = ((1 - t) * x0 + t * noise).requires_grad_()
    found = adaptive_log_prob(velocity, x, x0, level)
    e = (velocity - (noise - x0)).detach()
    size = e.abs().mean((1, 2))
    torch.testing.assert_close(found, -level * e.square().mean((1, 2)) / size)
    found.sum().backward()
    torch.testing.assert_close(velocity.grad, -2 * t * e / (8 * size.view(3, 1, 1)))
    assert x.grad.abs().sum((1, 2)).tolist() == pytest.approx([2, 2, 2])
    torch.testing.assert_close(adaptive_error(velocity[1:2], x[1:2], x0[1:2], 0.5), -found[1:2])


def test_surrogates_resolve_small_changes_of_the_policy():
    """Log-probs of about 3 that differ by 1e-9: (v - w)(v + w - 2 target), averaged in float64. And whatever the
    network's precision, the arithmetic is float64."""
    velocity, noise, x0, direction = (t.float() for t in draws(1, 100_000, count=4, seed=3))
    moved = velocity + 1e-6 * direction
    ratio = matching_log_prob(moved, noise, x0) - matching_log_prob(velocity, noise, x0)
    v, w, target = velocity.double(), moved.double(), noise.double() - x0.double()
    expected = ((v - w) * (v + w - 2 * target)).mean()
    assert abs(expected) < 1e-7
    assert ratio.item() == pytest.approx(expected.item(), rel=1e-5)
    x, rough = (0.3 * x0 + 0.7 * noise).bfloat16(), velocity.bfloat16()
    for function, given in ((matching_log_prob, (noise, x0)), (adaptive_log_prob, (x, x0, 0.7))):
        exact = [t.double() if torch.is_tensor(t) else t for t in (rough, *given)]
        assert torch.equal(function(rough, *given), function(*exact))


def test_velocity_divergence():
    velocity = torch.tensor([[1.0, 2.0], [0.0, 0.0]], requires_grad=True)
    other = torch.tensor([[1.0, 4.0], [3.0, 1.0]], requires_grad=True)
    found = velocity_divergence(velocity, other)
    assert found.tolist() == [2, 5]
    found.sum().backward()
    assert velocity.grad.tolist() == [[0, -2], [-3, -1]]
    assert other.grad is None


def test_soft_clip():
    """eta (e^2x - 1) / (e^2x + 1) at x = A / eta: 3/5 eta at x = ln 2, eta far out, A near 0."""
    given = torch.tensor([3 * math.log(2), -3 * math.log(2), 1e-3, 1e3])
    assert soft_clip(given, 3.0).tolist() == pytest.approx([1.8, -1.8, 1e-3, 3.0], rel=1e-6)


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
