"""Losses of reward models against hand arithmetic, and what they make of ties and of what is not labelled."""

import math

import pytest
import torch

from alignment.reward_training.losses import (
    answer_cells,
    bradley_terry,
    comparison_cells,
    labels_of_scores,
    ranked_right,
    regression_cells,
)

NAN = math.nan


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def test_bradley_terry_by_hand():
    d = torch.tensor([0.7, 0.7, 0.7], dtype=torch.float64)
    label = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    won, lost = -math.log(sigmoid(0.7)), -math.log(1 - sigmoid(0.7))
    assert bradley_terry(d, label).tolist() == pytest.approx([won, lost, (won + lost) / 2])
    assert bradley_terry(d, label, "skip").tolist() == pytest.approx([won, lost, 0])


def test_with_room_for_ties_by_hand():
    """k = 5: wins log(1 + 5 e^-d); a tie is what is left of 1, here in probabilities."""
    d = torch.tensor([[0.7, 0.7, 0.7]], dtype=torch.float64)
    won, lost = 1 / (1 + 5 * math.exp(-0.7)), 1 / (1 + 5 * math.exp(0.7))
    expected = [-math.log(won), -math.log(lost), -math.log(1 - won - lost)]
    assert comparison_cells(d, torch.tensor([[1.0, -1.0, 0.0]]), "btt")[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("loss", ["bt", "btt"])
def test_the_mean_counts_cells_without_a_label_which_have_no_gradient(loss):
    d = torch.tensor([[0.3, 2.0], [-1.0, 0.5]], dtype=torch.float64, requires_grad=True)
    cells = comparison_cells(d, torch.tensor([[1.0, NAN], [NAN, -1.0]]), loss)
    known = comparison_cells(d[[0, 1], [0, 1]][:, None], torch.tensor([[1.0], [-1.0]]), loss)
    assert cells.mean().item() == pytest.approx(known.sum().item() / 4)
    cells.mean().backward()
    assert (d.grad != 0).tolist() == [[True, False], [False, True]]
    assert d.grad.isfinite().all()


def test_regression_by_hand():
    raw = torch.tensor([[1.0, 2.0], [0.5, -1.0]], requires_grad=True)
    scores, centre = torch.tensor([[4.0, NAN], [2.0, 3.0]]), torch.tensor([3.0, 3.0])
    cells = regression_cells(raw, scores, centre)
    assert cells.tolist() == [[0.0, 0.0], [2.25, 1.0]]  # (1 - 1)^2, no score, (0.5 + 1)^2, (-1 - 0)^2
    cells.sum().backward()
    assert raw.grad.tolist() == [[0.0, 0.0], [3.0, -2.0]]


def test_answers_by_hand():
    """Clip 0 is better than 1: Yes for 0, No for 1, over the whole vocabulary, so that the two need not add up to 1."""
    answers = torch.tensor([[0.5, 0.2], [0.1, 0.7]], dtype=torch.float64).log().requires_grad_()
    first, second = torch.tensor([0, 1, 0, 0]), torch.tensor([1, 0, 1, 1])
    cells = answer_cells(answers, first, second, torch.tensor([[1.0], [-1.0], [0.0], [NAN]], dtype=torch.float64))
    expected = -(math.log(0.5) + math.log(0.7)) / 2
    assert cells[:, 0].tolist() == pytest.approx([expected, expected, 0, 0])
    cells.sum().backward()
    assert answers.grad.tolist() == [[-1.0, 0.0], [0.0, -1.0]]


def test_labels_and_ranks_of_scores():
    a, b = torch.tensor([1.0, 1.0, 1.0, NAN]), torch.tensor([2.0, 0.5, 1.05, 0.0])
    assert labels_of_scores(a, b, 0.1).tolist()[:3] == [-1.0, 1.0, 0.0]
    assert labels_of_scores(a, b, 0.1)[3].isnan()
    right = ranked_right(torch.tensor([2.0, 2.0, 0.0, 2.0, 2.0]), torch.tensor([1.0, -1.0, 1.0, 0.0, NAN]))
    assert right.tolist()[:3] == [1.0, 0.0, 0.5]
    assert right[3:].isnan().all()
