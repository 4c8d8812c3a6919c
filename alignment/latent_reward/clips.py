"""A latent reward as a reward of clips, which are encoded and noised first.

F frames, H W pixels, N clips
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from rewards import Clip, Reward, RewardError, Scores
from samplers import Encoder, seed_for
from samplers.rollout import generators

from ..data.latents import fit_video
from ..errors import UserError, in_one_line
from .model import LatentReward, read_card

LEVELS = (0.1, 0.3, 0.5)


class LatentClipReward(Reward):
    """Mean over noise levels of what a run of latent_reward has learned; total is the mean over its dimensions.

        rewards.load("alignment.latent_reward:LatentClipReward", path="runs/tiny_latent_reward")

    Clips are cut and resampled to the size and rate of the videos that it learned from. All see the same noise. It is
    for pipelines that start from text alone.

    Args:
        path: a run's folder, or its latent_reward/.
        levels: of noise, in (0, 1].
        model: folder or hub id of the pipeline, where it has moved.
        device: None: a GPU where there is one.
        batch: clips at once.
    Raises: RewardError where the files do not fit, or a clip is too short.
    """

    name = "latent_reward"

    def __init__(
        self,
        path: str | Path,
        levels: Sequence[float] = LEVELS,
        model: str | None = None,
        device: str | None = None,
        batch: int = 8,
    ):
        self.check(path, levels, model, device, batch)
        self.levels, self.batch = sorted(levels, reverse=True), batch
        try:
            self.reward = LatentReward.load(path, device, **({"path": model} if model else {}))
        except UserError as error:
            raise RewardError(f"reward {self.name}: {in_one_line(error)}") from error

    @staticmethod
    def check(
        path: str | Path,
        levels: Sequence[float] = LEVELS,
        model: str | None = None,
        device: str | None = None,
        batch: int = 8,
    ) -> None:
        """Refuse what can be refused without reading weights."""
        if not levels or not all(0 < level <= 1 for level in levels):
            raise RewardError(f"reward latent_reward: levels are {list(levels)}, expected some above 0, up to 1")
        if batch < 1:
            raise RewardError(f"reward latent_reward: batch is {batch}, expected 1 or more")
        try:
            read_card(path)
        except UserError as error:
            raise RewardError(f"reward latent_reward: {in_one_line(error)}") from error

    @cached_property
    def encoder(self) -> Encoder:
        """Of the reward's pipeline."""
        try:
            with torch.enable_grad():
                return self.reward.encoder("a video")
        except (ValueError, TypeError) as error:
            name = type(self.reward.pipe).__name__
            raise RewardError(f"reward {self.name}: {name} cannot encode clips: {in_one_line(error)}") from error

    def score(self, clips: Sequence[Clip]) -> Scores:
        parts = [self._scored(clips[start : start + self.batch]) for start in range(0, len(clips), self.batch)]
        scores = torch.cat(parts)
        return Scores(scores.mean(1), dict(zip(self.reward.dimensions, scores.unbind(1), strict=True)))

    def _scored(self, clips: Sequence[Clip]) -> Tensor:
        """(N, D)."""
        states = self.encoder(torch.stack([self._fitted(clip) for clip in clips]))
        prompts = [clip.prompt for clip in clips]
        found = []
        for level in self.levels:
            noise = torch.randn(states.shape[1:], generator=generators([seed_for(self.name, level)])[0]).to(states)
            found.append(self.reward.score((1 - level) * states + level * noise, level, prompts))
        return torch.stack(found).mean(0)

    def _fitted(self, clip: Clip) -> Tensor:
        """(F, C, H, W) as the pipeline makes videos."""
        frames, _, height, width = self.encoder.video_shape
        try:
            return fit_video(255 * clip.video.float(), clip.fps, frames, self.reward.design.fps, height, width)
        except ValueError as error:
            raise RewardError(f"reward {self.name}: the clip of {clip.prompt[:80]!r} {error}") from error
