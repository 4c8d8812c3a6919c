"""Losses, as pure functions on tensors."""

from __future__ import annotations

import torch
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
