"""Losses of reward models, cell by cell: one cell is one comparison, or one clip, in one dimension.

C comparisons, N clips, K dimensions; cells without a label are NaN in labels and scores, and 0 in losses
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..objectives import bradley_terry_with_ties

TIES = ("skip", "half")


def bradley_terry(difference: Tensor, label: Tensor, ties: str = "half") -> Tensor:
    """-log P(label) of the same shape under the Bradley-Terry model, P(first wins) = sigmoid(d).

    Args:
        difference: d, the score of the first minus that of the second.
        label: 1 where the first is better, -1 where the second is, 0 for a tie.
        ties: "half": a tie is half a win of either; "skip": it teaches nothing.
    """
    first, second = F.logsigmoid(difference), F.logsigmoid(-difference)
    tie = (first + second) / 2 if ties == "half" else torch.zeros_like(first)
    return -torch.where(label > 0, first, torch.where(label < 0, second, tie))


def comparison_cells(difference: Tensor, label: Tensor, loss: str, theta: float = 5.0, ties: str = "half") -> Tensor:
    """(C, K) losses of comparisons.

    VideoAlign takes the mean over all cells, those without a label included, so that every label weighs the same
    whatever else its batch holds; so does what calls this.

    Args:
        difference: (C, K).
        label: (C, K) 1, -1, 0, or NaN.
        loss: "btt" with room for ties (theta), or "bt" (ties).
    """
    known = label.isfinite()
    label = label.nan_to_num()
    cells = (
        bradley_terry_with_ties(difference, label, theta) if loss == "btt" else bradley_terry(difference, label, ties)
    )
    return torch.where(known, cells, 0.0)


def regression_cells(raw: Tensor, scores: Tensor, centre: Tensor) -> Tensor:
    """(N, K) squared errors (raw - (score - centre))^2.

    Args:
        raw: (N, K) of the model, whose head has no bias.
        scores: (N, K), or NaN.
        centre: (K,) of the scores; VideoAlign subtracts 3, the middle of a scale from 1 to 5.
    """
    return torch.where(scores.isfinite(), (raw - (scores - centre).nan_to_num()).square(), 0.0)


def answer_cells(answers: Tensor, first: Tensor, second: Tensor, label: Tensor) -> Tensor:
    """(C, 1) mean of -log P(Yes) of the better and -log P(No) of the worse clip; 0 for ties and without a label.

    Args:
        answers: (N, 2) log-probabilities of Yes and of No.
        first, second: (C,) the clips that are compared.
        label: (C, 1) 1, -1, 0, or NaN.
    """
    better = torch.where(label[:, 0] < 0, second, first)
    worse = torch.where(label[:, 0] < 0, first, second)
    cells = -(answers[better, 0] + answers[worse, 1]) / 2
    return torch.where(label.abs() == 1, cells[:, None], 0.0)


def labels_of_scores(first: Tensor, second: Tensor, tie_eps: float = 0.0) -> Tensor:
    """1, -1 or 0, of the same shape: which score is higher by more than tie_eps; NaN where one is."""
    gap = first - second
    return torch.where(gap.isnan(), torch.nan, torch.where(gap.abs() <= tie_eps, 0.0, gap.sign()))


def ranked_right(difference: Tensor, label: Tensor) -> Tensor:
    """1 where the better one scores higher, 0 where it scores lower, 1/2 where both score the same; NaN for ties."""
    right = (1 + (difference.sign() * label)) / 2
    return torch.where(label == 0, torch.nan, right)
