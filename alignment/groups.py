"""What every algorithm that compares the samples of a prompt shares: its settings, and advantages over processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .advantages import (
    COMBINES,
    STDS,
    RunningStd,
    best_and_worst,
    combined_advantages,
    compared_rewards,
    group_statistics,
    spread_share,
)

if TYPE_CHECKING:
    from .training import Run


@dataclass
class GroupConfig:
    prompts_per_iteration: int = 8  # over all processes
    group_size: int = 8  # samples a prompt
    keep: int | None = None  # of a group's samples, half the best and half the worst, are trained on; None: all
    combine: str = "rewards"  # what is added up over rewards: rewards, advantages, gdpo or losses
    std: str = "group"  # what advantages are divided by: group, global, running, quasi or none
    max_advantage: float | None = 5.0
    updates_per_rollout: int = 1  # optimiser steps, each on its part of every group


class Signal(NamedTuple):
    """What this process's N samples are worth."""

    advantages: Tensor  # (K, N); K is 1 unless every reward has a loss of its own
    weights: Tensor  # (K,), of the losses
    rows: list[int]  # the samples that are trained on, as many in every group
    kept: int  # how many in every group

    def rows_of_part(self, part: int, parts: int) -> list[int]:
        """Those of update `part` of so many: in turn within every group, so that each update sees all groups."""
        return [row for i, row in enumerate(self.rows) if i % self.kept % parts == part]


def check_groups(config: GroupConfig, processes: int) -> list[str]:
    """What is wrong with the shared settings, one line each."""
    wrong = []
    if config.group_size < 2:
        wrong.append(f"algorithm.group_size: {config.group_size} has no group to compare with; use 2 or more")
    if config.keep is not None and not 2 <= config.keep <= config.group_size:
        wrong.append(f"algorithm.keep: {config.keep} is not in 2..group_size")
    if config.prompts_per_iteration < 1 or config.prompts_per_iteration % processes:
        wrong.append(
            f"algorithm.prompts_per_iteration: {config.prompts_per_iteration} cannot be dealt to {processes} processes"
        )
    if not 1 <= config.updates_per_rollout <= (config.keep or config.group_size):
        wrong.append(f"algorithm.updates_per_rollout: {config.updates_per_rollout} is not in 1..group_size (or keep)")
    for key, known in (("std", STDS), ("combine", COMBINES)):
        if getattr(config, key) not in known:
            wrong.append(f"algorithm.{key}: {getattr(config, key)!r} is none of {', '.join(known)}")
    return wrong


def own_signal(run: Run, rewards: dict[str, Tensor], config: GroupConfig) -> Signal:
    """Compare all processes' rewards, name -> (all samples,), and return this process's part; log how they spread."""
    total = run.scorer.combined(rewards)
    size = config.group_size
    groups = torch.arange(len(total), device=total.device) // size
    running = None
    if config.std == "running":
        moments = RunningStd(state=run.memory.get("reward_moments"))
        running = moments.update(compared_rewards(rewards, run.scorer.weights, config.combine)[0])
        run.memory["reward_moments"] = moments.state()
    advantages, weights = combined_advantages(
        rewards, run.scorer.weights, groups, config.combine, config.std, config.max_advantage, running
    )
    scores = torch.where(total.isfinite(), weights @ advantages, torch.nan)
    kept = best_and_worst(scores, groups, config.keep or size)
    spread = group_statistics(total, groups, total.isfinite())[2].view(-1, size)[:, 0]
    run.log(
        {
            "advantage/std": float(advantages.std(correction=0)),
            "groups/zero_spread": 1 - float(spread.float().mean()),
            "groups/spread_share": spread_share(total, groups),
        }
    )

    def own(values: Tensor) -> Tensor:
        return values.view(*values.shape[:-1], -1, size)[..., run.processes.rank :: run.processes.count, :].flatten(-2)

    return Signal(own(advantages), weights, own(kept).nonzero().flatten().tolist(), config.keep or size)
