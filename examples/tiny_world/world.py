"""The tiny world: one sprite that moves over a plain background, and the sentence that says so.

N clips, F frames (9), H W pixels (32 x 32)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rewards.sprite import BACKGROUNDS, COLOURS, SHAPES, SPEEDS, STEPS, coverage

FRAMES = 9
SIZE = 32
RADIUS = (5.5, 6.75)  # px of the circle; the square has its area, the triangle, whose corners reach far, 0.85 of it
DIRECTIONS = ("up", "down", "left", "right", "up left", "up right", "down left", "down right")
TABLES = (BACKGROUNDS, COLOURS, SHAPES, DIRECTIONS, SPEEDS)  # of the first five fields of Sprites
SPEED_JITTER = 0.1  # px a frame
PLACE_JITTER = 2.5  # px
DROPPED = {"background": 0.1, "colour": 0.1, "shape": 0.1, "direction": 0.1, "speed": 0.3}
DROPPED_WHOLE = 0.1


class Sprites(NamedTuple):
    """What N clips show; indices count in the order of the tables."""

    background: Tensor  # (N,) of BACKGROUNDS
    colour: Tensor  # (N,) of COLOURS
    shape: Tensor  # (N,) of SHAPES
    direction: Tensor  # (N,) of DIRECTIONS
    speed: Tensor  # (N,) of SPEEDS
    area: Tensor  # (N,) px
    pace: Tensor  # (N,) px a frame
    middle: Tensor  # (N, 2) x, y of the middle of the path


def direction_vectors() -> Tensor:
    """Unit vectors (8, 2), x to the right and y down."""
    sums = torch.tensor([[sum(STEPS[w][i] for w in name.split()) for i in range(2)] for name in DIRECTIONS])
    return sums / sums.norm(dim=-1, keepdim=True)


def sample(num: int, generator: torch.Generator) -> Sprites:
    """Draw N sprites. They start near the centre and travel outwards, and never leave the frame."""

    def pick(table) -> Tensor:
        return torch.randint(len(table), (num,), generator=generator)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(num, *shape, generator=generator)

    background, colour, shape = pick(BACKGROUNDS), pick(COLOURS), pick(SHAPES)
    direction, speed = pick(DIRECTIONS), pick(SPEEDS)
    area = math.pi * uniform(*RADIUS).square() * torch.where(shape == SHAPES.index("triangle"), 0.85, 1.0)
    pace = torch.tensor(list(SPEEDS.values()))[speed] + uniform(-SPEED_JITTER, SPEED_JITTER)
    half = direction_vectors()[direction] * pace[:, None] * (FRAMES - 1) / 2  # (N, 2) half of the travel
    middle = SIZE / 2 + half + uniform(-PLACE_JITTER, PLACE_JITTER, 2)
    before, after = _reach(shape, area)
    middle = torch.maximum(middle, before + half.abs())
    middle = torch.minimum(middle, SIZE - after - half.abs())
    return Sprites(background, colour, shape, direction, speed, area, pace, middle)


def _reach(shape: Tensor, area: Tensor) -> tuple[Tensor, Tensor]:
    """How far a shape extends from its centroid to the left and top, and to the right and bottom: (N, 2) each."""
    radius, side, inradius = (area / math.pi).sqrt(), area.sqrt() / 2, (area / (3 * math.sqrt(3))).sqrt()
    sideways = torch.stack([radius, side, math.sqrt(3) * inradius], -1)
    top = torch.stack([radius, side, 2 * inradius], -1)
    bottom = torch.stack([radius, side, inradius], -1)
    of_shape = [extent.gather(-1, shape[:, None]).squeeze(-1) for extent in (sideways, top, bottom)]
    return torch.stack([of_shape[0], of_shape[1]], -1), torch.stack([of_shape[0], of_shape[2]], -1)


def centres(sprites: Sprites) -> Tensor:
    """Where the sprites are: (N, F, 2) px."""
    time = torch.arange(FRAMES) - (FRAMES - 1) / 2
    velocity = direction_vectors()[sprites.direction] * sprites.pace[:, None]
    return sprites.middle[:, None] + time[:, None] * velocity[:, None]


def render(sprites: Sprites, offset: Tensor | float = 0.0) -> Tensor:
    """Draw clips: (N, F, 3, H, W) in [0, 1]. offset: (N, F, 2) px by which the sprite is off its path."""
    centre = centres(sprites) + offset  # (N, F, 2)
    pixel = torch.arange(SIZE) + 0.5
    dx = (pixel[None, :] - centre[..., 0, None, None]).expand(-1, -1, SIZE, -1)
    dy = (pixel[:, None] - centre[..., 1, None, None]).expand(-1, -1, -1, SIZE)
    mask = coverage(dx, dy, sprites.area[:, None, None, None])  # (N, F, S, H, W)
    mask = mask[torch.arange(len(mask)), :, sprites.shape][:, :, None]  # (N, F, 1, H, W)
    background = torch.tensor(list(BACKGROUNDS.values()))[sprites.background][:, None, :, None, None]
    colour = torch.tensor(list(COLOURS.values()))[sprites.colour][:, None, :, None, None]
    return background + mask * (colour - background)


def caption(
    background: str | None, colour: str | None, shape: str | None, direction: str | None, speed: str | None
) -> str:
    """Say what a clip shows, leaving out what is None: "a red circle moving up left quickly on a gray background"."""
    parts = ["a", colour, shape or "sprite"]
    if direction or speed:
        parts += ["moving", direction, speed]
    if background:
        parts += ["on a", background, "background"]
    return " ".join(part for part in parts if part)


def attributes(sprites: Sprites) -> Tensor:
    """What the captions name: (N, 5) indices into TABLES."""
    return torch.stack(sprites[:5], -1)


def describe(row: list[int], kept: Sequence[bool] = (True,) * 5) -> str:
    """The caption of one row of `attributes`, without those that are not kept."""
    rows = zip(TABLES, row, kept, strict=True)
    return caption(*(list(table)[index] if keep else None for table, index, keep in rows))


def captions(sprites: Sprites, generator: torch.Generator | None = None) -> list[str]:
    """N captions; with a generator some attributes, or the whole caption, are dropped as in pretraining."""
    indices = attributes(sprites)
    if generator is None:
        return [describe(row) for row in indices.tolist()]
    kept = (torch.rand(indices.shape, generator=generator) >= torch.tensor(list(DROPPED.values()))).tolist()
    whole = (torch.rand(len(indices), generator=generator) >= DROPPED_WHOLE).tolist()
    rows = zip(indices.tolist(), kept, whole, strict=True)
    return [describe(row, keeps) if said else "" for row, keeps, said in rows]


def vocabulary() -> list[str]:
    """All words of the captions, in a fixed order."""
    attributes = [*COLOURS, *SHAPES, *BACKGROUNDS, *STEPS, *SPEEDS]
    return ["a", "sprite", "moving", "on", "background", *attributes]


def prompt_split(
    num_train: int = 192, num_heldout: int = 256, seed: int = 0, speeds: bool = False
) -> tuple[list[str], list[str]]:
    """Training and held-out prompts for alignment, with or without speed words; no combination is in both."""
    combinations = list(itertools.product(BACKGROUNDS, COLOURS, SHAPES, DIRECTIONS))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(combinations), generator=generator)[: num_train + num_heldout].tolist()
    paces = [list(SPEEDS)[i] for i in torch.randint(len(SPEEDS), (len(order),), generator=generator).tolist()]
    rows = zip(order, paces, strict=True)
    prompts = [caption(*combinations[i], pace if speeds else None) for i, pace in rows]
    return prompts[:num_train], prompts[num_train:]
