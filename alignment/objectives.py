"""Losses, as pure functions on tensors."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """(B,) PPO's clipped loss, max(-A r, -A clip(r, 1 - clip, 1 + clip)) with r = exp(log_ratio).

    Args:
        log_ratio: (B,) log-probability ratio, averaged over the elements of a sample: useful clips are then small
            (1e-4 to 1e-3) and have to exceed the drift between rollout and replay.
        advantage: (B,).
        clip: > 0. Without effect where the ratio is 1, that is, with one update a rollout.
    Source: arXiv 1707.06347, eq. 7; arXiv 2505.07818, eq. 7.
    """
    ratio = log_ratio.exp()
    advantage = advantage.to(ratio.dtype)
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip, 1 + clip))


def is_clipped(log_ratio: Tensor, advantage: Tensor, clip: float) -> Tensor:
    """(B,) bool: samples whose gradient the clip removes."""
    ratio = log_ratio.detach().exp()
    return ((ratio > 1 + clip) & (advantage > 0)) | ((ratio < 1 - clip) & (advantage < 0))


def bradley_terry_with_ties(difference: Tensor, label: Tensor, theta: float = 5.0) -> Tensor:
    """-log P(label), of the same shape as `difference`, under the Bradley-Terry model with ties.

    P(first wins) = sigmoid(d - log theta), P(second wins) = sigmoid(-d - log theta), and the rest is a tie,
    (theta^2 - 1) times the product of the two.

    Args:
        difference: d, the score of the first minus that of the second.
        label: 1 where the first is better, -1 where the second is, 0 for a tie.
        theta: > 1; how much room ties have.
    Source: VideoAlign (arXiv 2501.13918), eq. 2 and 3, after Rao and Kupper (1967).
    """
    first, second = F.logsigmoid(difference - math.log(theta)), F.logsigmoid(-difference - math.log(theta))
    tie = first + second + math.log(theta**2 - 1)
    return -torch.where(label > 0, first, torch.where(label < 0, second, tie))
