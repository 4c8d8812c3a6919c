"""Scores of a batch of videos by every reward of a recipe, with image statistics beside them.

N videos
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rewards import Clip, Reward, RewardError, answers, load
from rewards.statistics import image_statistics

from .config import Recipe
from .data import Prompt
from .distributed import Processes
from .errors import UserError, one_line


class Readings(NamedTuple):
    """What was measured on N videos."""

    totals: dict[str, Tensor]  # reward name -> (N,) float32, NaN where masked
    details: dict[str, Tensor]  # reward/<name>/<dim> and image/<statistic> -> (N,)


class Scorer:
    """The rewards of a recipe: trained ones with their weights, and held-out ones."""

    def __init__(self, recipe: Recipe, device: torch.device):
        self.weights, self.fps = recipe.trained_rewards, recipe.fps
        self.rewards: dict[str, Reward] = {}
        for name, config in recipe.rewards.items():
            try:
                reward = load(config.use, **config.options)
            except Exception as error:  # what a reward's constructor raises is up to its author
                raise UserError(f"rewards.{name}: {_described(error)}") from error
            inner = getattr(reward, "inner", reward)
            if isinstance(inner, torch.nn.Module):
                inner.to(device)
            if reward.scope == "batch":
                raise UserError(f"rewards.{name}: scope 'batch' is not supported in training; use 'clip' or 'group'")
            self.rewards[name] = reward

    @property
    def compares(self) -> bool:
        """Whether a reward compares the clips of a group with one another."""
        return any(reward.scope == "group" for reward in self.rewards.values())

    @torch.no_grad()
    def __call__(
        self,
        videos: Tensor,
        prompts: Sequence[Prompt],
        groups: Sequence[int],
        duels: tuple[Tensor, Tensor] | None = None,
    ) -> Readings:
        """Score videos (N, F, C, H, W) in [0, 1]; a group's videos have to be here together.

        Args:
            duels: where each video is a group of its own, the videos again and a rival for each: what rewards of scope
                "group" see in their place.
        Raises: RewardError, one line that names the reward, whatever it raised itself.
        """

        def clips_of(films: Tensor) -> list[Clip]:
            rows = zip(films, prompts, groups, strict=True)
            return [Clip(film, prompt.text, self.fps, group, prompt.meta) for film, prompt, group in rows]

        clips, num = clips_of(videos), len(videos)
        alone = {name: reward for name, reward in self.rewards.items() if duels is None or reward.scope == "clip"}
        found = answers(alone, clips)
        if len(alone) < len(self.rewards):
            rest = {name: reward for name, reward in self.rewards.items() if name not in alone}
            found |= answers(rest, [clip for films in duels for clip in clips_of(films)])
        totals, details = {}, {f"image/{name}": value for name, value in image_statistics(videos).items()}
        for name in self.rewards:
            scores = found[name]
            if isinstance(scores, Exception):
                raise RewardError(f"rewards.{name}: {_described(scores)}") from scores
            totals[name] = scores.total[:num].to(videos.device)
            details |= {f"reward/{name}/{dim}": v[:num].to(videos.device) for dim, v in scores.dims.items()}
        return Readings(totals, {name: value.float() for name, value in details.items()})

    def combined(self, totals: dict[str, Tensor]) -> Tensor:
        """(N,) weighted sum of the trained rewards; NaN where any of them is masked."""
        return sum(weight * totals[name] for name, weight in self.weights.items())


def _described(error: Exception) -> str:
    """An error in one line, with the place in the reward's own code where it rose."""
    if isinstance(error, RewardError):
        return one_line(error)
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if "site-packages" not in f.filename), frames[-1])
    return f"{type(error).__name__}: {one_line(error)} ({frame.filename}:{frame.lineno})"


def as_matrix(readings: Readings, processes: Processes) -> tuple[list[str], Tensor]:
    """Column names, the same in all processes, and (N, columns) float32, to be gathered in one piece.

    A reward that answered nothing in one process has no dims there: NaN stands for them.
    """
    columns = {f"reward/{name}": values for name, values in readings.totals.items()} | readings.details
    names = processes.union(list(columns))
    missing = torch.full_like(next(iter(columns.values())), math.nan)
    return names, torch.stack([columns.get(name, missing) for name in names], 1)


def joined(parts: Sequence[Readings]) -> Readings:
    """Readings of several batches as those of one, NaN where a batch has no such dim."""
    sizes = [len(next(iter(part.totals.values()))) for part in parts]

    def cat(columns: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        names = dict.fromkeys(name for column in columns for name in column)
        some = {name: next(column[name] for column in columns if name in column) for name in names}
        rows = list(zip(columns, sizes, strict=True))
        return {n: torch.cat([c.get(n, v.new_full((num,), math.nan)) for c, num in rows]) for n, v in some.items()}

    return Readings(cat([part.totals for part in parts]), cat([part.details for part in parts]))


def summary(names: list[str], matrix: Tensor) -> dict[str, float]:
    """Mean of every column over the entries that are not masked."""
    return {name: float(column.nanmean()) for name, column in zip(names, matrix.unbind(1), strict=True)}
