"""Errors and losses of pairs against hand arithmetic, closed forms and finite differences."""

import math

import pytest
import torch

from alignment.preference_losses import (
    anchor_sign,
    beta_at,
    dpo_loss,
    frame_errors,
    implicit_accuracy,
    ipo_loss,
    margin,
    matching_error,
    pair_losses,
    poly_loss,
    seppo_loss,
    token_losses,
)
from tests.alignment.linear_pairs import (
    BETA,
    FRAMES,
    LABELS,
    LEVEL,
    LOSERS,
    NOISE,
    POLICY,
    REFERENCE,
    WINNERS,
    C,
    F,
    P,
    by_frame,
    draws,
    error,
    gradient,
    leaf,
    margins,
    own_error,
    slope,
    velocity,
)


def test_the_margins_of_these_tests_are_of_all_kinds():
    for z in (margins(POLICY), margins(POLICY, by_frame)):
        assert 0.3 < z.abs().mean() < 3
        assert z.min() < -0.1 < 0.1 < z.max()
        assert len(z.unique()) == z.numel()


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4), (2, 3, 2, 2), (2, 3, 2, 2, 2)])
def test_matching_error_is_one_number_a_sample(shape):
    v, noise, clean = draws(*shape, count=3)
    found = matching_error(v, noise, clean)
    assert found.shape == (2,)
    for i in range(2):
        rows = zip(*(t[i].reshape(-1).tolist() for t in (v, noise, clean)), strict=True)
        squares = [(a - (b - c)) ** 2 for a, b, c in rows]
        assert found[i].item() == pytest.approx(sum(squares) / len(squares), rel=1e-12)
    torch.testing.assert_close(matching_error(v[1:], noise[1:], clean[1:]), found[1:])  # whatever else is in the batch


def test_errors_resolve_what_training_changes():
    """Errors of about 3 under velocities that differ by 1e-6: (v - w)(v + w - 2 target), and exact arithmetic on what
    a network in bfloat16 gives."""
    v, noise, clean, direction = (t.float() for t in draws(1, 50_000, count=4, seed=3))
    moved = v + 1e-6 * direction
    change = matching_error(moved, noise, clean) - matching_error(v, noise, clean)
    a, b, target = moved.double(), v.double(), noise.double() - clean.double()
    expected = ((a - b) * (a + b - 2 * target)).mean()
    assert abs(expected) < 1e-7
    assert change.item() == pytest.approx(expected.item(), rel=1e-5)
    rough = [t.bfloat16() for t in (v, noise, clean)]
    assert torch.equal(matching_error(*rough), matching_error(*(t.double() for t in rough)))
    frames = torch.arange(50_000) % 7
    assert torch.equal(frame_errors(*rough, frames), frame_errors(*(t.double() for t in rough), frames))


def test_frame_errors_whatever_the_layout():
    v, noise, clean = velocity(POLICY, WINNERS), NOISE, WINNERS
    found = frame_errors(v, noise, clean, FRAMES)
    expected = torch.stack([own_error_of(v[:, :, f], noise[:, :, f], clean[:, :, f]) for f in range(F)], 1)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.mean(1), own_error(POLICY, WINNERS))  # frames of one size
    packed = [t.permute(0, 2, 3, 4, 1).flatten(1, 3) for t in (v, noise, clean)]  # (P, F H W, C), tokens
    torch.testing.assert_close(frame_errors(*packed, torch.arange(F).repeat_interleave(6).view(-1, 1)), expected)
    mixed = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = [t[:, mixed] for t in packed]
    frame_of = torch.arange(F).repeat_interleave(6)[mixed].view(-1, 1).expand(-1, C)
    torch.testing.assert_close(frame_errors(*shuffled, frame_of), expected)


def own_error_of(v, noise, clean):
    return (v - noise + clean).pow(2).flatten(1).mean(1)


def test_frames_of_different_size_are_means_of_their_own():
    """Squares 1, 4, 9, 16; frame 1 holds the first, frame 0 the rest: 29 / 3 and 1."""
    v, zero = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(1, 4)
    assert frame_errors(v, zero, zero, torch.tensor([1, 0, 0, 0])).tolist() == [pytest.approx([29 / 3, 1])]


def test_margin_by_hand():
    """beta 2: -(Delta_w - Delta_l); the policy fits the winner 0.5 better and the loser 0.25 worse."""
    given = [torch.tensor([x]) for x in (1.0, 2.25, 1.5, 2.0)]
    assert margin(*given, 2.0).tolist() == [0.75]
    assert margin(*given, torch.tensor([4.0])).tolist() == [1.5]
    assert margin(*given, 0.0).tolist() == [0]
    errors = [t.expand(2).unsqueeze(1).expand(2, 2) for t in given]
    assert margin(*errors, torch.tensor([2.0, 4.0])).tolist() == [[0.75, 0.75], [1.5, 1.5]]  # one a pair, not a frame


def test_losses_by_hand():
    """sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4; IPO at z = 3, beta 2: h = 1.5, (1.5 - 0.25)^2."""
    z = torch.tensor([math.log(3), -math.log(3), 0.0], dtype=torch.float64)
    assert dpo_loss(z).tolist() == pytest.approx([math.log(4 / 3), math.log(4), math.log(2)])
    assert poly_loss(z, 8.0).tolist() == pytest.approx([math.log(4 / 3) + 2, math.log(4) + 6, math.log(2) + 4])
    assert torch.equal(poly_loss(z, 0.0), dpo_loss(z))
    assert ipo_loss(torch.tensor([3.0]), 2.0).item() == pytest.approx(1.5625)
    z, beta = torch.tensor([[3.0, 0.0], [3.0, 0.0]]), torch.tensor([2.0, 1.0])
    assert ipo_loss(z, beta).tolist() == [[1.5625, 0.0625], [6.25, 0.25]]
    assert dpo_loss(torch.tensor([-1e4, 1e4])).tolist() == [1e4, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", [0.0, 4.0, 500.0, 5000.0])
def test_at_the_reference_every_loss_is_log_2(beta, dtype):
    clean = WINNERS.to(dtype), LOSERS.to(dtype)
    theta = leaf(REFERENCE.to(dtype))
    w, l = error(theta, clean[0]), error(theta, clean[1])  # noqa: E741
    z = margin(w, l, w, l, beta)
    frames = by_frame(theta, clean[0]), by_frame(theta, clean[1])
    sums, counts = token_losses(margin(*frames, *frames, beta), LABELS)
    decided, _ = pair_losses(margin(*frames, *frames, beta), LABELS)
    assert dpo_loss(z).tolist() == [math.log(2)] * P
    assert seppo_loss(w, l, w, l, beta).tolist() == [math.log(2)] * P
    assert sums.tolist() == pytest.approx([count * math.log(2) for count in counts.tolist()], rel=1e-15)
    assert decided.tolist() == [math.log(2), 0, math.log(2), math.log(2), math.log(2)]
    assert poly_loss(z, 8.0).tolist() == pytest.approx([math.log(2) + 4] * P)
    assert implicit_accuracy(z).tolist() == [0.5] * P
    if beta > 0:
        assert ipo_loss(z, beta).tolist() == pytest.approx([1 / (4 * beta**2)] * P)


@pytest.mark.parametrize(
    ("loss", "factor"),
    [  # of grad e_w - grad e_l at the reference
        (lambda z: dpo_loss(z), BETA / 4),
        (lambda z: poly_loss(z, 8.0), BETA / 4 * (1 + 8.0 / 2)),
        (lambda z: ipo_loss(z, BETA), 1 / (2 * BETA)),
    ],
)
def test_gradient_at_the_reference(loss, factor):
    found = gradient(lambda theta: loss(margins(theta)).sum(), REFERENCE)
    expected = gradient(lambda theta: (own_error(theta, WINNERS) - own_error(theta, LOSERS)).sum(), REFERENCE)
    torch.testing.assert_close(found, factor * expected)


@pytest.mark.parametrize(
    ("loss", "definition"),
    [  # h is -(Delta_w - Delta_l) / 2
        (lambda z: dpo_loss(z), lambda h: (1 + (-BETA * h).exp()).log()),
        (lambda z: poly_loss(z, -0.5), lambda h: (1 + (-BETA * h).exp()).log() - 0.5 / (1 + (BETA * h).exp())),
        (lambda z: ipo_loss(z, BETA), lambda h: (h - 1 / (2 * BETA)) ** 2),
    ],
)
def test_values_and_gradients_away_from_the_reference(loss, definition):
    def own(theta):
        w, l = (own_error(theta, x) - own_error(REFERENCE, x) for x in (WINNERS, LOSERS))  # noqa: E741
        return definition(-0.5 * (w - l))

    torch.testing.assert_close(loss(margins(POLICY)), own(POLICY))
    found = gradient(lambda theta: loss(margins(theta)).sum(), POLICY)
    torch.testing.assert_close(found, slope(lambda theta: own(theta).sum(), POLICY), rtol=1e-6, atol=1e-7)


def test_descent_fits_winners_better_and_losers_worse():
    for loss in (dpo_loss, lambda z: poly_loss(z, 8.0)):
        given = [leaf(error(theta, x)) for theta in (POLICY, REFERENCE) for x in (WINNERS, LOSERS)]
        loss(margin(*given, BETA)).sum().backward()
        assert (given[0].grad > 0).all()
        assert (given[1].grad < 0).all()
        assert given[2].grad is None
        assert given[3].grad is None


def test_members_swapped():
    """L(z) - L(-z) = -z, and z changes its sign with the members."""
    z, swapped = margins(POLICY), margins(POLICY, winners=LOSERS, losers=WINNERS)
    torch.testing.assert_close(swapped, -z)
    torch.testing.assert_close(dpo_loss(z) - dpo_loss(swapped), -z)
    assert (implicit_accuracy(z) + implicit_accuracy(swapped)).tolist() == [1] * P


def test_dpo_on_the_predicted_noise_is_dpo_with_the_flow_schedule():
    """eps_hat = x_t + (1 - t) v, so that errors of the noise are (1 - t)^2 times those of the velocity."""

    def noise_error(theta, clean):
        level = LEVEL.view(P, 1, 1, 1, 1)
        predicted = (1 - level) * clean + level * NOISE + (1 - level) * velocity(theta, clean)
        return (predicted - NOISE).pow(2).mean((1, 2, 3, 4))

    w, l = (noise_error(POLICY, x) - noise_error(REFERENCE, x) for x in (WINNERS, LOSERS))  # noqa: E741
    expected = (1 + (BETA / 2 * (w - l)).exp()).log()
    found = dpo_loss(margins(POLICY, beta=beta_at(BETA, LEVEL, "flow")))
    torch.testing.assert_close(found, expected)
    assert (found - dpo_loss(margins(POLICY))).abs().min() > 1e-3
    assert beta_at(4.0, [0.25, 1.0], "flow").tolist() == [2.25, 0]
    assert beta_at(4.0, [0.25, 1.0], "constant").tolist() == [4, 4]
    with pytest.raises(ValueError, match="'cosine', expected one of constant, flow"):
        beta_at(BETA, LEVEL, "cosine")


def test_betas_of_other_conventions():
    elements = WINNERS[0].numel()
    of_sums = margins(POLICY, lambda theta, x: own_error(theta, x) * elements, BETA / elements)
    torch.testing.assert_close(of_sums, margins(POLICY))
    w, l = (own_error(POLICY, x) - own_error(REFERENCE, x) for x in (WINNERS, LOSERS))  # noqa: E741
    without_half = (1 + (BETA * (w - l)).exp()).log()  # PNAPO
    torch.testing.assert_close(dpo_loss(margins(POLICY, beta=2 * BETA)), without_half)


def test_a_pair_of_one_video_teaches_nothing():
    for errors in (error, by_frame):  # two forwards
        z = margins(leaf(POLICY), errors, 500.0, losers=WINNERS)
        assert (dpo_loss(z) == math.log(2)).all()
    assert not gradient(lambda theta: dpo_loss(margins(theta, beta=500.0, losers=WINNERS)).sum(), POLICY).any()
    # one forward for both members, in float32
    theta, clean = leaf(POLICY.float()), WINNERS.float()
    both = torch.cat([clean, clean])
    level = LEVEL.float().view(P, 1, 1, 1, 1).repeat(2, 1, 1, 1, 1)
    noise = NOISE.float().repeat(2, 1, 1, 1, 1)
    v = torch.einsum("oc,pcfhw->pofhw", theta, (1 - level) * both + level * noise)
    ours = matching_error(v, noise, both).split(P)
    loss = dpo_loss(margin(*ours, *(error(REFERENCE.float(), clean),) * 2, 500.0)).sum()
    found, winners = (torch.autograd.grad(x, theta, retain_graph=True)[0].norm() for x in (loss, ours[0].sum()))
    assert found <= 1e-5 * 500 / 4 * winners


def test_what_both_members_share_does_not_count():
    given = [error(theta, x) for theta in (POLICY, REFERENCE) for x in (WINNERS, LOSERS)]
    z = margin(*given, BETA)
    for together in ((0, 1), (2, 3), (0, 2), (1, 3)):
        raised = [x + 0.7 if i in together else x for i, x in enumerate(given)]
        torch.testing.assert_close(margin(*raised, BETA), z)
    assert not gradient(lambda theta: dpo_loss(margins(theta, beta=0.0)).sum(), POLICY).any()


def test_a_pair_does_not_depend_on_its_batch():
    beta = torch.linspace(1, 9, P)
    z = margins(POLICY, beta=beta)
    for i in range(P):
        given = [error(theta, x)[i : i + 1] for theta in (POLICY, REFERENCE) for x in (WINNERS, LOSERS)]
        torch.testing.assert_close(margin(*given, float(beta[i])), z[i : i + 1])


def test_implicit_accuracy():
    z = torch.tensor([0.3, -2.0, 0.0, 1e-12, -1e-12])
    assert implicit_accuracy(z).tolist() == [1, 0, 0.5, 1, 0]


def seppo(theta, **options):
    given = [error(at, x) for at in (theta, REFERENCE) for x in (WINNERS, LOSERS)]
    return seppo_loss(*given, BETA, **options)


def test_seppo_goes_by_whether_the_winner_is_fitted_better():
    change_w, change_r = (own_error(POLICY, x) - own_error(REFERENCE, x) for x in (WINNERS, LOSERS))
    better = change_w < 0
    assert 0 < better.sum() < P
    for lowest in (-1, 0):
        h = torch.where(better, change_w - change_r, change_w - lowest * change_r)
        torch.testing.assert_close(seppo(POLICY, lowest=lowest), (1 + (BETA / 2 * h).exp()).log())
    torch.testing.assert_close(seppo(POLICY)[better], dpo_loss(margins(POLICY))[better])


def test_seppo_sign():
    errors, reference = leaf(torch.tensor([1.0, 2.0, 1.5])), torch.tensor([2.0, 1.0, 1.5])
    assert anchor_sign(errors, reference).tolist() == [1, -1, 0]
    assert anchor_sign(errors, reference, lowest=0).tolist() == [1, 0, 0]
    assert not anchor_sign(errors, reference).requires_grad


def test_seppo_gradients_lead_where_the_sign_says():
    """With the sign a constant; the sample is pushed away, pulled up or left alone, the winner always pulled up."""
    w, r = leaf(torch.tensor([1.0, 2.0, 1.5])), leaf(torch.tensor([1.2, 1.1, 1.7]))
    references = [leaf(torch.tensor([1.5, 1.5, 1.5])), leaf(torch.tensor([1.3, 1.4, 1.2]))]
    for lowest, signs in ((-1, [-1, 1, 0]), (0, [-1, 0, 0])):
        found = torch.autograd.grad(seppo_loss(w, r, *references, 2.0, lowest).sum(), (w, r))
        assert found[0].sign().tolist() == [1, 1, 1]
        assert found[1].sign().tolist() == signs
    seppo_loss(w, r, *references, 2.0).sum().backward()
    assert references[0].grad is None
    assert references[1].grad is None


def test_seppo_on_the_winner_itself():
    given = torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([1.4]), torch.tensor([1.4])
    assert seppo_loss(*given, 5.0).item() == pytest.approx(math.log(2))
    theta = leaf(POLICY)
    ours, reference = error(theta, WINNERS), error(REFERENCE, WINNERS)
    better = anchor_sign(ours, reference) > 0
    assert better.any()
    assert not torch.autograd.grad(seppo_loss(ours, ours, reference, reference, BETA)[better].sum(), theta)[0].any()
