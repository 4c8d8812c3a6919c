"""Flow-RWR (VideoAlign, arXiv 2501.13918): supervised fine-tuning on videos weighted by exp(reward).

Rewards are standardised among the videos of a prompt and divided by a temperature: high ones make it supervised
fine-tuning on everything, low ones on the best of each prompt. In the paper it gains about as much as supervised
fine-tuning and far less than Flow-DPO with the same data.

Videos are given with scores (data.preferences), or sampled by the policy and rewarded every iteration (data.prompts).

Differs from the paper: rewards are standardised a prompt, not over all prompts, so that easy prompts do not dominate;
weights are divided by their mean and bounded by `max_weight`.

Logs: loss, error (unweighted), weight (its mean over what was trained on), and where the policy samples
weight/effective (share of the videos that equal weights would need for the same variance).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..config import Recipe
from ..data import Group, Pair
from ..errors import UserError
from ..preference_losses import reward_weights
from ..tally import Tally
from ..training import Run
from ..weighted import (
    Video,
    WeightedConfig,
    check_weighted,
    given_updates,
    given_videos,
    sample_videos,
    sampled_updates,
    update,
)


@dataclass
class Config(WeightedConfig):
    temperature: float = 1.0  # of exp(reward / temperature), for standardised rewards
    max_weight: float = 5.0  # weights have mean 1 before this bound


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = check_weighted(recipe, processes)
    if config.temperature <= 0:
        wrong.append(f"algorithm.temperature: {config.temperature} is not above 0")
    if config.max_weight < 1:
        wrong.append(f"algorithm.max_weight: {config.max_weight} is below 1, the mean of the weights")
    return wrong


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
            updates = sampled_updates(run, sampled, weights_of(run, sampled.rewards))
        for examples in updates:
            update(run, examples, tally)
        run.log(tally.metrics(run))


def chosen(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[tuple[Video, float]]:
    """The given videos that are scored, with their weights. Raises: UserError where none is."""
    config: Config = recipe.algorithm
    videos = [video for video in given_videos(recipe, records) if video.score is not None]
    if not videos:
        raise UserError(f"{place}: nothing is scored; annotate it, or use sft")
    scores, groups = torch.tensor([v.score for v in videos]), torch.tensor([v.group for v in videos])
    weights = reward_weights(scores, groups, config.temperature, config.max_weight)
    return list(zip(videos, weights.tolist(), strict=True))


def weights_of(run: Run, rewards: torch.Tensor) -> torch.Tensor:
    """(N,) of all processes' samples, 0 where a reward is masked; logs how many count."""
    config: Config = run.recipe.algorithm
    known = rewards.isfinite()
    groups = torch.arange(len(rewards), device=rewards.device) // config.group_size
    weights = torch.zeros(len(rewards), dtype=torch.float64, device=rewards.device)
    weights[known] = reward_weights(rewards[known], groups[known], config.temperature, config.max_weight)
    run.log({"weight/effective": float(weights.sum().square() / weights.square().sum() / known.sum())})
    return weights
