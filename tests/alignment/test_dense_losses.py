"""Losses of pairs that are judged segment by segment, against hand arithmetic and DPO."""

import math

import pytest
import torch

from alignment.preference_losses import (
    dpo_loss,
    frame_errors,
    margin,
    pair_losses,
    pair_margin,
    token_losses,
    usable,
)
from tests.alignment.linear_pairs import (
    BETA,
    FRAMES,
    LABELS,
    LOSERS,
    NOISE,
    POLICY,
    REFERENCE,
    WINNERS,
    F,
    P,
    by_frame,
    gradient,
    leaf,
    margins,
    velocity,
)


def dense(theta, labels=LABELS, first=WINNERS, second=LOSERS):
    return margins(theta, by_frame, winners=first, losers=second), labels


def test_dense_losses_by_hand():
    """Frames of z = ln 3, -ln 3, 5, ln 3 with labels 1, -1, 0, -1: p = 3/4, 3/4, none, 1/4."""
    z, ln3 = torch.tensor([[1.0, -1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]]).double() * math.log(3), math.log(3)
    z[0, 2] = 5.0
    labels = torch.tensor([[1, -1, 0, -1], [0, 0, 0, 0]])
    sums, counts = token_losses(z, labels)
    assert sums.tolist() == pytest.approx([2 * math.log(4 / 3) + math.log(4), 0])
    assert counts.tolist() == [3, 0]
    assert pair_margin(z, labels).tolist() == pytest.approx([ln3 / 3, 0])
    losses, counts = pair_losses(z, labels)
    assert losses.tolist() == pytest.approx([math.log(1 + 3 ** (-1 / 3)), 0])
    assert counts.tolist() == [1, 0]


def test_dense_labels_that_are_all_alike_are_dpo():
    z = margins(POLICY)
    for sign in (1, -1):
        labels = torch.full((P, F), sign)
        losses, counts = pair_losses(*dense(POLICY, labels))
        torch.testing.assert_close(losses, dpo_loss(sign * z))
        sums, frames = token_losses(*dense(POLICY, labels))
        assert counts.tolist() == [1] * P
        assert frames.tolist() == [F] * P
        assert (sums / frames > losses + 1e-4).all()
        # at the reference they have DPO's gradient, both of them
        expected = gradient(lambda theta, sign=sign: dpo_loss(sign * margins(theta)).sum(), REFERENCE)
        for form, per in ((token_losses, F), (pair_losses, 1)):
            found = gradient(lambda theta, form=form, labels=labels: form(*dense(theta, labels))[0].sum(), REFERENCE)
            torch.testing.assert_close(found / per, expected)


def test_forms_agree_where_one_frame_is_untied():
    labels = torch.zeros(P, F, dtype=torch.int64)
    labels[torch.arange(P), torch.tensor([0, 3, 1, 2, 0])] = torch.tensor([1, -1, 1, 1, -1])
    (tokens, frames), (pairs, counts) = token_losses(*dense(POLICY, labels)), pair_losses(*dense(POLICY, labels))
    torch.testing.assert_close(tokens, pairs)
    assert frames.tolist() == counts.tolist() == [1] * P
    expected = [labels[i].sum() * margins(POLICY, by_frame)[i, labels[i] != 0].item() for i in range(P)]
    torch.testing.assert_close(pair_margin(*dense(POLICY, labels)), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("form", [token_losses, pair_losses])
def test_ties_have_no_part(form):
    outputs = [leaf(velocity(POLICY, x)) for x in (WINNERS, LOSERS)]
    frames = [frame_errors(v, NOISE, x, FRAMES) for v, x in zip(outputs, (WINNERS, LOSERS), strict=True)]
    z = margin(*frames, by_frame(REFERENCE, WINNERS), by_frame(REFERENCE, LOSERS), BETA)
    losses, counts = form(z, LABELS)
    losses.sum().backward()
    untied = LABELS != 0
    for v in outputs:
        per_frame = v.grad.abs().amax((1, 3, 4))
        assert not per_frame[~untied].any()
        assert (per_frame[untied] > 1e-4).all()
    assert losses[1] == 0
    assert counts[1] == 0
    assert (losses[untied.any(1)] > 0).all()
    # further ties change nothing, neither the loss nor what it is divided by
    longer, ties = torch.cat([z, 9 * z], 1), torch.cat([LABELS, 0 * LABELS], 1)
    assert torch.equal(form(longer, ties)[1], counts)
    torch.testing.assert_close(form(longer, ties)[0], losses)


@pytest.mark.parametrize("form", [token_losses, pair_losses])
def test_members_swapped_and_labels_negated(form):
    losses, counts = form(*dense(POLICY))
    swapped, same = form(*dense(POLICY, -LABELS, LOSERS, WINNERS))
    torch.testing.assert_close(swapped, losses)
    assert torch.equal(counts, same)
    assert (form(*dense(POLICY, -LABELS))[0] - losses)[counts > 0].abs().min() > 1e-2


def test_frames_count_alike_whatever_pair_they_are_of():
    """The mean over all untied frames is none of the pairs' means, and not one over ties, too."""
    z, labels = dense(POLICY)
    sums, counts = token_losses(z, labels)
    every = [(1 + (-labels[i, f] * z[i, f]).exp()).log() for i in range(P) for f in range(F) if labels[i, f] != 0]
    assert counts.tolist() == [3, 0, 4, 1, 3]
    torch.testing.assert_close(sums.sum() / counts.sum(), sum(every) / 11)


@pytest.mark.parametrize(
    ("labels", "kept"),
    [([0, 0, 0, 0, 1], False), ([0, 0, -1, 0, 1], True), ([0, 0, 0, -1], True), ([0, 0], False), ((1,), True)],
)
def test_pairs_of_ties_are_not_usable(labels, kept):
    assert usable(labels) is kept
    assert usable(labels, least=0.0) is any(labels)
