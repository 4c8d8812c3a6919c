"""Advantages: how much better a sample is than the others of its group, and what follows from that.

All functions see the samples of all processes at once, gathered first, so that every process computes the same. A
reward that is not finite is invalid: it enters no statistic and its advantage is 0.

N samples, group index g in 0..num_groups-1, K rewards
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

NO_SPREAD = 1e-6  # a group whose rewards differ by less than this share of their magnitude has no preference
QUASI_NORM = 0.8  # p of Neighbor GRPO
STDS = ("group", "global", "none", "quasi", "running")
COMBINES = ("rewards", "advantages", "gdpo", "losses")
WEIGHTED_SUM = "weighted sum"


def group_sums(values: Tensor, groups: Tensor, valid: Tensor) -> Tensor:
    """(N,) float64: for each sample the sum of `values` (N,) over the valid members of its group."""
    num = int(groups.max()) + 1 if len(groups) else 0
    sums = torch.zeros(num, dtype=torch.float64, device=values.device)
    return sums.index_add(0, groups, torch.where(valid, values.double(), 0.0))[groups]


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
    count = group_sums(valid, groups, valid).clamp(min=1)
    mean = group_sums(r, groups, valid) / count
    centred = torch.where(valid, r - mean, 0.0)
    std = (group_sums(centred.square(), groups, valid) / count).sqrt()
    most = torch.zeros(num, dtype=torch.float64, device=r.device)
    gap = most.scatter_reduce(0, groups, centred.abs(), "amax")
    size = most.scatter_reduce(0, groups, r.abs(), "amax")
    return mean, std, (gap > NO_SPREAD * size)[groups]


def group_quasi_norm(centred: Tensor, groups: Tensor, valid: Tensor, p: float = QUASI_NORM) -> Tensor:
    """(N,) float64: (sum |c|^p)^(1/p) / sqrt(n) over the n valid members of each sample's group.

    p = 2 is the standard deviation; with p < 2 it is larger than that, and most where all members are about equally
    far from the mean, so that groups whose rewards only scatter count less than those in which a few stand out.

    Args:
        centred: (N,) rewards minus their group's mean.
        p: > 0.
    Source: Neighbor GRPO (arXiv 2511.16955), eq. 11, a sum over the group. The root of n is added here: it makes
        p = 2 the usual advantage and does not change how groups of one size compare.
    """
    count = group_sums(valid, groups, valid).clamp(min=1)
    return group_sums(centred.abs().pow(p), groups, valid).pow(1 / p) / count.sqrt()


def group_advantages(
    rewards: Tensor,
    groups: Tensor,
    valid: Tensor | None = None,
    std: str = "group",
    clamp: float | None = 5.0,
    running: float | None = None,
) -> Tensor:
    """(N,) float32 advantages: centred on the group's mean, divided by a standard deviation.

    Zero for invalid samples and for groups without spread. Scaling a reward by a positive factor changes nothing
    unless std is "none": there is no constant in the denominator ("running" has to be scaled, too).

    Args:
        std: "group"; "global", one for all samples given; "none" (Dr. GRPO, arXiv 2503.20783); "quasi", see
            `group_quasi_norm`; "running", the number given as `running`.
        clamp: bound on the absolute advantage, None for none.
        running: standard deviation of this reward over the iterations so far, see `RunningStd`.
    Source: GRPO (arXiv 2402.03300, section 4.1.2), which leaves open what a group without spread is worth.
    """
    return _clamped(_standardised(rewards, groups, valid, std, running), clamp)


def _standardised(
    rewards: Tensor, groups: Tensor, valid: Tensor | None, std: str, running: float | None = None
) -> Tensor:
    """(N,) float64 advantages before the clamp; their sum over every group is 0."""
    valid = torch.isfinite(rewards) if valid is None else valid & torch.isfinite(rewards)
    mean, group_std, spread = group_statistics(rewards, groups, valid)
    centred = torch.where(valid, rewards.double() - mean, 0.0)
    if std == "group":
        scale = group_std
    elif std == "global":
        scale = _overall_std(rewards, valid)
    elif std == "none":
        scale = torch.ones_like(centred)
    elif std == "quasi":
        scale = group_quasi_norm(centred, groups, valid)
    elif std == "running":
        if running is None:
            raise ValueError("std 'running' needs the running standard deviation")
        scale = torch.full_like(centred, running)
    else:
        raise ValueError(f"std is {std!r}, expected one of {', '.join(STDS)}")
    return torch.where(valid & spread, centred / scale, 0.0)


def _overall_std(values: Tensor, valid: Tensor) -> Tensor:
    return group_statistics(values, torch.zeros_like(valid, dtype=torch.int64), valid)[1]


def _clamped(advantages: Tensor, clamp: float | None) -> Tensor:
    return (advantages if clamp is None else advantages.clamp(-clamp, clamp)).float()


def compared_rewards(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], combine: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The rewards that are compared within groups, each (N,), and their weights.

    With combine "rewards" that is their weighted sum alone, invalid where any of them is; otherwise each by itself.
    """
    if combine == "rewards":
        return {WEIGHTED_SUM: sum(weight * rewards[name] for name, weight in weights.items())}, {WEIGHTED_SUM: 1.0}
    return {name: rewards[name] for name in weights}, dict(weights)


def combined_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    combine: str = "rewards",
    std: str = "group",
    clamp: float | None = 5.0,
    running: Mapping[str, float] | None = None,
) -> tuple[Tensor, Tensor]:
    """Advantages of several rewards: (K, N) and their weights (K,), both float32.

    The loss is sum_k weights[k] * loss(ratio, advantages[k]). K is the number of rewards with combine "losses", and 1
    with weight 1 otherwise.

    Args:
        rewards: name -> (N,), NaN where invalid; those without a weight are left alone.
        weights: name -> any number but 0; a negative one makes less of the reward better.
        combine: what is added up.
            "rewards": the rewards; then one advantage (Flow-GRPO, arXiv 2505.05470). The reward of the largest
                spread decides most; a sample is invalid where any of its rewards is.
            "advantages": the rewards' advantages (MixGRPO, arXiv 2507.21802), so that their scales do not matter. A
                sample keeps the advantages of those rewards that are valid.
            "gdpo": the same, divided by its standard deviation over all samples that have a valid reward (GDPO, arXiv
                2601.05242), so that the number and the weights of the rewards do not change the size of a step.
                The mean that GDPO subtracts is 0 already, as that of every group is, so that a group that no reward
                tells apart stays exactly 0. Where the rewards cancel everywhere, all is 0.
            "losses": the clipped losses (DanceGRPO, arXiv 2505.07818). The same as "advantages" but for samples whose
                advantages differ in sign where a ratio is clipped: each loss is clipped by itself.
        std: see `group_advantages`.
        clamp: bound on every advantage returned, None for none.
        running: for std "running", the standard deviation of each of `compared_rewards`.
    """
    if combine not in COMBINES:
        raise ValueError(f"combine is {combine!r}, expected one of {', '.join(COMBINES)}")
    parts, shares = compared_rewards(rewards, weights, combine)
    running = running or {}
    rows = torch.stack([_standardised(r, groups, None, std, running.get(name)) for name, r in parts.items()])
    weight = torch.tensor(list(shares.values()), dtype=torch.float64, device=rows.device)
    if combine == "losses":  # a negative weight would turn the pessimism of the clip into optimism
        return _clamped(rows * weight.sign()[:, None], clamp), weight.abs().float()
    total = weight @ rows
    if combine == "gdpo":
        valid = torch.stack([r.isfinite() for r in parts.values()]).any(0)
        spread = total.abs().max() > NO_SPREAD * (weight.abs() @ rows.abs()).max()
        total = torch.where(spread, total / _overall_std(total, valid), 0.0)
    return _clamped(total[None], clamp), torch.ones(1, device=rows.device)


class RunningStd:
    """Standard deviation of every reward over the iterations so far: moving averages of its first two moments.

    The first iteration sets the moments; each later one adds 1 - decay of its own, before they are used. They are
    kept as mean and variance, which is the same and loses no digits where the mean is large. The rewards of all
    prompts enter, so the spread between prompts counts as well as that within groups.

    Args:
        decay: in [0, 1); 0 is the iteration's own deviation.
        state: what `state` returned, to go on from there.
    Source: EMA-GRPO (OneThinker, arXiv 2512.03043). Its code also divides a group with an advantage above 5 by the
        group's own deviation and bounds the running one by 1e-3 from below; here the clamp and the rule for groups
        without spread take care of these cases, whatever the scale of the reward.
    """

    def __init__(self, decay: float = 0.99, state: Mapping[str, Mapping[str, float]] | None = None):
        self.decay = decay
        self.moments = {name: (m["mean"], m["variance"]) for name, m in (state or {}).items()}

    def update(self, rewards: Mapping[str, Tensor]) -> dict[str, float]:
        """Take in an iteration's rewards, name -> (N,), and return the deviation of each.

        It is NaN for a reward that was never valid, whose advantages are 0 anyway.
        """
        for name, values in rewards.items():
            valid = values[values.isfinite()].double()
            if len(valid):
                mean, variance = float(valid.mean()), float(valid.var(correction=0))
                old_mean, old_variance = self.moments.get(name, (mean, variance))
                share = 1 - self.decay
                between = self.decay * share * (mean - old_mean) ** 2
                self.moments[name] = (
                    old_mean + share * (mean - old_mean),
                    self.decay * old_variance + share * variance + between,
                )
        return {name: self.moments[name][1] ** 0.5 if name in self.moments else math.nan for name in rewards}

    def state(self) -> dict[str, dict[str, float]]:
        """Everything that the next iteration needs, fit for JSON."""
        return {name: {"mean": mean, "variance": variance} for name, (mean, variance) in self.moments.items()}


def best_and_worst(scores: Tensor, groups: Tensor, keep: int) -> Tensor:
    """(N,) bool: the best ceil(keep / 2) and the worst floor(keep / 2) members of every group.

    Exactly `keep` of each, whatever the scores, so that every process trains as many: among equals the first are the
    better ones, and members without a finite score are taken, in order, only where the others do not suffice.

    Args:
        scores: (N,) float, e.g. weights @ advantages of `combined_advantages`, NaN where a sample shall not be used.
        groups: (N,) int64.
        keep: 1 to the size of the smallest group.
    Source: DanceGRPO (arXiv 2505.07818), whose advantages are those of the whole group.
    """
    sizes = torch.bincount(groups)
    smallest = int(sizes[sizes > 0].min())
    if not 1 <= keep <= smallest:
        raise ValueError(f"keep is {keep}, but the smallest group has {smallest} members")
    valid = scores.isfinite()
    order = torch.where(valid, -scores, torch.inf).argsort(stable=True)
    order = order[groups[order].argsort(stable=True)]  # group by group, best first, invalid last
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[groups[order]]
    num_valid = group_sums(valid, groups, valid)
    from_top, from_bottom = (keep + 1) // 2, keep // 2
    extreme = (rank < from_top) | ((rank >= num_valid - from_bottom) & (rank < num_valid))
    return torch.where(num_valid < keep, rank < keep, extreme)


def spread_share(rewards: Tensor, groups: Tensor) -> float:
    """Share of the rewards' variance that lies within groups, over valid rewards; NaN where they do not vary.

    In 0..1. Near 0 the samples of a prompt are nearly alike to the reward, whose own noise may then decide which of
    them wins, and more noise in the steps may help. Where the prompt makes no difference, the expected share is about
    1 - 1 / group size.

    Args:
        rewards: (N,) float, NaN where invalid.
        groups: (N,) int64.
    """
    valid = rewards.isfinite()
    everything = torch.zeros_like(groups)
    _, total, spread = group_statistics(rewards, everything, valid)
    _, within, _ = group_statistics(rewards, groups, valid)
    return float(within[valid].square().mean() / total[0].square()) if bool(spread.any()) else math.nan
