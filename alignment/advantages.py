"""Advantages: how much better a sample is than the others of its group.

N samples, group index g in 0..num_groups-1
"""

from __future__ import annotations

import torch
from torch import Tensor

NO_SPREAD = 1e-6  # a group whose rewards differ by less than this share of their magnitude has no preference


def group_statistics(rewards: Tensor, groups: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, population standard deviation and "has a spread" of each sample's group, over its valid members.

    Args:
        rewards: (N,) float; invalid entries are ignored, NaN included.
        groups: (N,) int64.
        valid: (N,) bool.
    Returns: three (N,) float64 / bool tensors; a group without valid members has mean 0 and no spread.
    """
    num = int(groups.max()) + 1 if len(groups) else 0
    r = torch.where(valid, rewards.double(), 0.0)
    count = torch.zeros(num, dtype=torch.float64, device=r.device).index_add(0, groups, valid.double())
    count = count.clamp(min=1)
    mean = torch.zeros_like(count).index_add(0, groups, r) / count
    centred = torch.where(valid, r - mean[groups], 0.0)
    std = (torch.zeros_like(count).index_add(0, groups, centred.square()) / count).sqrt()
    gap = torch.zeros_like(count).scatter_reduce(0, groups, centred.abs(), "amax")
    size = torch.zeros_like(count).scatter_reduce(0, groups, r.abs(), "amax")
    return mean[groups], std[groups], (gap > NO_SPREAD * size)[groups]


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    valid: Tensor | None = None,
    std: str = "group",
    clamp: float | None = 5.0,
) -> Tensor:
    """(N,) float32 advantages: centred on the group's mean, divided by a standard deviation.

    Zero for invalid samples and for groups without spread. With std "group" scaling a reward by a positive factor
    changes nothing: there is no constant in the denominator.

    Args:
        std: "group", "global" (one for all samples given, so gather them over processes first) or "none" (Dr. GRPO,
            arXiv 2503.20783).
        clamp: bound on the absolute advantage, None for none.
    Source: GRPO (arXiv 2402.03300, section 4.1.2), which leaves open what a group without spread is worth.
    """
    valid = torch.isfinite(rewards) if valid is None else valid & torch.isfinite(rewards)
    mean, group_std, spread = group_statistics(rewards, groups, valid)
    use = valid & spread
    centred = torch.where(use, rewards.double() - mean, 0.0)
    if std == "group":
        scale = torch.where(use, group_std, 1.0)
    elif std == "global":
        everything = rewards[valid].double()
        scale = everything.std(correction=0) if bool(use.any()) else torch.ones_like(centred)
    elif std == "none":
        scale = torch.ones_like(centred)
    else:
        raise ValueError(f"std is {std!r}, expected group, global or none")
    advantages = centred / scale
    return (advantages if clamp is None else advantages.clamp(-clamp, clamp)).float()
