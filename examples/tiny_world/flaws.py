"""Clips of the tiny world with planted flaws: what its preference models are trained on.

B clips, F frames
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import world

LEVELS = 3  # of flaws: none, some, many


class Batch(NamedTuple):
    """Clips with planted flaws."""

    video: Tensor  # (B, F, 3, H, W) in [0, 1], all frames
    prompts: list[str]
    flaws: Tensor  # (B, 3) of VQ, MQ and TA: 0 is perfect
    sprites: world.Sprites
    offset: Tensor  # (B, F, 2) px that the sprite is off its path


def draw(num: int, generator: torch.Generator) -> Batch:
    """Clips with flaws of every kind and level, each drawn by itself."""
    sprites = world.sample(num, generator)
    flaws = torch.randint(LEVELS, (num, 3), generator=generator)
    offset = motion_flaw(sprites, flaws[:, 1], generator)
    prompts, flaws[:, 2] = wrong_words(sprites, flaws[:, 2], generator)
    return Batch(visual_flaw(world.render(sprites, offset), flaws[:, 0], generator), prompts, flaws, sprites, offset)


def motion_flaw(sprites: world.Sprites, level: Tensor, generator: torch.Generator) -> Tensor:
    """Offsets (B, F, 2) from an even path: jitter of .5 or 1.2 px, or one or two stops followed by a jump."""
    num = len(level)
    jitter = torch.tensor([0.0, 0.5, 1.2])[level][:, None, None] * torch.randn(
        num, world.FRAMES, 2, generator=generator
    )
    moment = torch.arange(world.FRAMES).expand(num, -1)
    late = torch.zeros(num, world.FRAMES, dtype=torch.long)
    for stop in range(1, LEVELS):
        first = torch.randint(1, world.FRAMES - 3, (num, 1), generator=generator)
        within = (moment > first) & (moment <= first + 2) & (level[:, None] >= stop)
        late = torch.where(within, (moment - first).maximum(late), late)
    velocity = world.direction_vectors()[sprites.direction] * sprites.pace[:, None]
    stutter = -late[..., None] * velocity[:, None]
    return torch.where((torch.rand(num, generator=generator) < 0.5)[:, None, None], jitter, stutter)


def visual_flaw(video: Tensor, level: Tensor, generator: torch.Generator) -> Tensor:
    """Noise of .06 or .15, a blur over 3 or 5 px, or colours that fade by a third or two thirds."""
    video, kind = video.clone(), torch.randint(3, (len(video),), generator=generator)
    for amount in range(1, LEVELS):
        noisy, blurred, faded = ((kind == number) & (level == amount) for number in range(3))
        noise = torch.randn(video[noisy].shape, generator=generator)
        video[noisy] += (0.0, 0.06, 0.15)[amount] * noise
        frames = F.pad(video[blurred].flatten(0, 1), [amount] * 4, mode="replicate")
        video[blurred] = F.avg_pool2d(frames, 2 * amount + 1, 1).view_as(video[blurred])
        video[faded] = video[faded].lerp(video[faded].mean((1, 2, 3, 4), keepdim=True), amount / 3)
    return video.clamp(0, 1)


def wrong_words(sprites: world.Sprites, level: Tensor, generator: torch.Generator) -> tuple[list[str], Tensor]:
    """Captions with `level` wrong attributes, fewer where a caption names fewer; and how many are wrong: (B,)."""
    prompts, wrong = [], []
    for row, count in zip(world.attributes(sprites).tolist(), level.tolist(), strict=True):
        named = torch.rand(5, generator=generator) >= torch.tensor([0.2, 0.2, 0.2, 0.2, 0.4])
        places = [i for i in torch.randperm(5, generator=generator).tolist() if named[i]][:count]
        for place in places:
            step = int(torch.randint(1, len(world.TABLES[place]), (), generator=generator))
            row[place] = (row[place] + step) % len(world.TABLES[place])
        prompts.append(world.describe(row, named.tolist()))
        wrong.append(len(places))
    return prompts, torch.tensor(wrong)
