"""Supervised fine-tuning on videos: flow matching on those worth imitating, with the levels of the preference methods.

Of a given pair that is the better one, of a scored group the best, of a group without scores every video. Where the
policy samples (data.prompts), the best of each group (rejection sampling, as RAFT, arXiv 2304.06767).

Logs: loss, error, weight (1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Recipe
from ..tally import Tally
from ..training import Run
from ..weighted import (
    WeightedConfig,
    check_weighted,
    given_updates,
    given_videos,
    sample_videos,
    sampled_updates,
    update,
    worth_imitating,
)


@dataclass
class Config(WeightedConfig):
    pass


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    return check_weighted(recipe, processes)


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return False


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    given = [(video, 1.0) for video in worth_imitating(given_videos(run))] if run.recipe.data.preferences else None
    for _ in run.iterations():
        tally = Tally()
        if given:
            updates = given_updates(run, given)
        else:
            sampled = sample_videos(run)
            updates = sampled_updates(run, sampled, best_of_groups(sampled.rewards, run.recipe.algorithm.group_size))
        for examples in updates:
            update(run, examples, tally)
        run.log(tally.metrics(run))


def best_of_groups(rewards: Tensor, group_size: int) -> Tensor:
    """(N,) 1 for the best sample of each group, none of a group whose rewards are equal or masked, else 0."""
    groups = rewards.view(-1, group_size).nan_to_num(nan=-math.inf)
    best = F.one_hot(groups.argmax(1), group_size).double()
    lowest = torch.where(groups.isfinite(), groups, math.inf).amin(1)
    return (best * (groups.amax(1) > lowest)[:, None]).flatten()
