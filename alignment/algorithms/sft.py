"""Supervised fine-tuning on videos: flow matching on those worth imitating, with the levels of the preference methods.

Of a given pair that is the better one, of a scored group the best, of a group without scores every video. Where the
policy samples (data.prompts), the best of each group (rejection sampling, as RAFT, arXiv 2304.06767).

Logs: loss, error, weight (1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import Recipe
from ..data import Group, Pair
from ..tally import Tally
from ..training import Run
from ..weighted import (
    Video,
    WeightedConfig,
    check_weighted,
    given_updates,
    sample_videos,
    sampled_updates,
    to_imitate,
    update,
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
    given = run.given.chosen("preferences", chosen)
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


def chosen(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[tuple[Video, float]]:
    """The given videos that are worth imitating, all of weight 1. Raises: UserError where none is."""
    return [(video, 1.0) for video in to_imitate(recipe, records, place)]


def best_of_groups(rewards: Tensor, group_size: int) -> Tensor:
    """(N,) 1 for the best sample of each group, none of a group whose rewards are equal or masked, else 0."""
    groups = rewards.view(-1, group_size).nan_to_num(nan=-math.inf)
    best = F.one_hot(groups.argmax(1), group_size).double()
    lowest = torch.where(groups.isfinite(), groups, math.inf).amin(1)
    return (best * (groups.amax(1) > lowest)[:, None]).flatten()
