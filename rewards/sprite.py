"""Verifiable rewards on sprite videos: what a clip shows is measured on its pixels and compared with its prompt.

The videos show one coloured shape that moves over a plain background ("a red circle moving up left quickly on a gray
background", see examples/tiny_world). `measure` is the oracle; a `SpriteReward` judges its measures against the words
of the prompt. Attributes that the prompt does not name are not judged. A clip without a sprite is a bad video, not a
failed call: it scores 0 with dims["valid"] = 0, and Scores.valid stays None.

All lengths are pixels of a frame of 32 x 32, whatever the size of the video (areas scale with H W / 32^2).

    N clips, F frames, H W pixels, S shapes
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .contract import Clip, Reward, Scores

Table = Mapping[str, tuple[float, float, float]]  # name -> RGB

COLOURS: Table = {
    "red": (0.90, 0.10, 0.10),
    "green": (0.10, 0.75, 0.15),
    "blue": (0.15, 0.25, 0.95),
    "yellow": (0.95, 0.90, 0.10),
    "purple": (0.70, 0.15, 0.85),
    "cyan": (0.10, 0.85, 0.90),
}
BACKGROUNDS: Table = {
    "black": (0.05, 0.05, 0.05),
    "gray": (0.50, 0.50, 0.50),
    "white": (0.95, 0.95, 0.95),
    "brown": (0.45, 0.28, 0.12),
}
SHAPES = ("circle", "square", "triangle")
STEPS = {"up": (0.0, -1.0), "down": (0.0, 1.0), "left": (-1.0, 0.0), "right": (1.0, 0.0)}  # x to the right, y down
SPEEDS = {"slowly": 0.5, "steadily": 0.95, "quickly": 1.4}  # px a frame
AREA = (40.0, 280.0)  # px of a valid sprite
CONTRAST = 0.2  # least distance in RGB between a valid sprite and its background
COMPACT = 0.85  # least share of the mask's mass that lies where a single shape would have it


class SpriteMeasures(NamedTuple):
    """What is seen in N clips. Indices count in the order of the tables above."""

    background: Tensor  # (N, 3) RGB
    background_index: Tensor  # (N,) nearest named background
    colour: Tensor  # (N, 3) RGB
    colour_index: Tensor  # (N,) nearest named colour
    shape_scores: Tensor  # (N, S) overlap with the ideal shape of equal area, intersection over union
    shape_index: Tensor  # (N,)
    centroid: Tensor  # (N, F, 2) x, y in px; the centre of the frame where nothing is seen
    velocity: Tensor  # (N, 2) x, y in px a frame, least squares over the clip
    area: Tensor  # (N, F) px
    contrast: Tensor  # (N,) distance of the two colours
    compact: Tensor  # (N, F) share of the mask's mass inside one shape's reach
    valid: Tensor  # (N,) bool: one sprite of a possible size in every frame
    smoothness: Tensor  # (N,) in [0, 1]: 1 / (1 + spread of the steps / mean step)

    @property
    def speed(self) -> Tensor:  # (N,) px a frame
        return self.velocity.norm(dim=-1)


def coverage(dx: Tensor, dy: Tensor, area: Tensor, softness: float = 1.0) -> Tensor:
    """Share of each pixel that circle, square and triangle (upright) of a given area cover.

    Args:
        dx, dy: (..., H, W) offsets of the pixels from the shape's centroid.
        area: (..., 1, 1) area in the square of the offsets' unit.
        softness: width of the edge; 1 is antialiasing.
    Returns: (..., S, H, W) in [0, 1].
    """
    circle = (dx.square() + dy.square()).sqrt() - (area / math.pi).sqrt()
    square = torch.maximum(dx.abs(), dy.abs()) - area.sqrt() / 2
    inradius = (area / (3 * math.sqrt(3))).sqrt()  # of an equilateral triangle; its corners are twice as far
    slanted = math.sqrt(3) / 2 * dx.abs() - dy / 2
    triangle = torch.maximum(dy, slanted) - inradius
    distance = torch.stack([circle, square, triangle], -3)
    return (0.5 - distance / softness).clamp(0, 1)


def measure(video: Tensor) -> SpriteMeasures:
    """Measure N clips of one sprite each. video: (N, F, 3, H, W) in [0, 1]."""
    height, width = video.shape[-2:]
    unit = math.sqrt(height * width) / 32  # pixels of the video in one px of the reference frame
    mask, background, colour = _segment(video.float(), unit)
    mass = mask.sum((-2, -1)).clamp_min(1e-6)  # (N, F)
    area = mass / unit**2
    x = (torch.arange(width, device=video.device) + 0.5) / unit
    y = (torch.arange(height, device=video.device) + 0.5) / unit
    centroid = torch.stack([(mask.sum(-2) * x).sum(-1), (mask.sum(-1) * y).sum(-1)], -1) / mass[..., None]
    centroid = torch.where(area[..., None] > 1, centroid, centroid.new_tensor([width, height]) / (2 * unit))

    dx = (x[None, :] - centroid[..., 0, None, None]).expand(-1, -1, height, -1)
    dy = (y[:, None] - centroid[..., 1, None, None]).expand(-1, -1, -1, width)
    ideal = coverage(dx, dy, area[..., None, None].clamp_min(1.0), softness=1 / unit)  # (N, F, S, H, W)
    shared = torch.minimum(ideal, mask[:, :, None]).sum((1, 3, 4))
    joined = torch.maximum(ideal, mask[:, :, None]).sum((1, 3, 4))
    shape_scores = shared / joined.clamp_min(1e-6)
    reach = 1.7 * (area / math.pi).sqrt() + 1  # a triangle's corner is 1.56 radii of the equal circle away
    near = dx.square() + dy.square() <= reach[..., None, None].square()
    compact = (mask * near).sum((-2, -1)) / mass
    plausible = (area > AREA[0]) & (area < AREA[1]) & (compact > COMPACT)
    contrast = (colour - background).norm(dim=-1)
    return SpriteMeasures(
        background=background,
        background_index=_nearest(background, BACKGROUNDS),
        colour=colour,
        colour_index=_nearest(colour, COLOURS),
        shape_scores=shape_scores,
        shape_index=shape_scores.argmax(-1),
        centroid=centroid,
        velocity=_slope(centroid),
        area=area,
        contrast=contrast,
        compact=compact,
        valid=plausible.all(-1) & (contrast > CONTRAST),
        smoothness=_smoothness(centroid),
    )


def _segment(video: Tensor, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Soft mask of the sprite (N, F, H, W), colour of the background (N, 3) and of the sprite (N, 3)."""
    smooth = F.avg_pool2d(video.flatten(0, 1), 3, 1, 1, count_include_pad=False).view_as(video)  # against pixel noise
    background = _border_median(video)
    colour = _strongest_median(video, smooth, background, max(1, round(AREA[0] * unit**2)))
    axis = (colour - background)[:, None, :, None, None]
    along = ((smooth - background[:, None, :, None, None]) * axis).sum(2)
    share = along / axis.square().sum(2).clamp_min(1e-4)  # 0 is the background, 1 the sprite
    return (2 * share - 0.5).clamp(0, 1), background, colour  # undoes the blur at edges and drops noise below a quarter


def _border_median(video: Tensor) -> Tensor:
    """Median colour of the frames' outermost pixels. video: (N, F, 3, H, W). Returns: (N, 3)."""
    edges = [video[..., 0, :], video[..., -1, :], video[..., 1:-1, 0], video[..., 1:-1, -1]]
    return torch.cat(edges, -1).transpose(1, 2).flatten(2).median(-1).values


def _strongest_median(video: Tensor, smooth: Tensor, background: Tensor, per_frame: int) -> Tensor:
    """Median colour of the pixels that differ most from the background, `per_frame` a frame. Returns: (N, 3)."""
    difference = (smooth - background[:, None, :, None, None]).square().sum(2).flatten(1)  # (N, F H W)
    best = difference.topk(per_frame * video.shape[1], dim=-1).indices
    pixels = video.transpose(1, 2).flatten(2)  # (N, 3, F H W)
    return pixels.gather(-1, best[:, None].expand(-1, 3, -1)).median(-1).values


def _nearest(colour: Tensor, table: Table) -> Tensor:
    return torch.cdist(colour, colour.new_tensor(list(table.values()))).argmin(-1)


def _slope(centroid: Tensor) -> Tensor:
    """Least-squares velocity of a path (N, F, 2). Returns: (N, 2), 0 for a single frame."""
    time = torch.arange(centroid.shape[1], device=centroid.device, dtype=centroid.dtype)
    time = time - time.mean()
    return (centroid * time[:, None]).sum(1) / time.square().sum().clamp_min(1e-6)


def _smoothness(centroid: Tensor) -> Tensor:
    """How even a path (N, F, 2) is. Relative to the mean step, or standing still would be the smoothest path of all."""
    steps = centroid.diff(dim=1)  # (N, F-1, 2)
    mean = steps.mean(1, keepdim=True)
    spread = (steps - mean).square().sum(-1).mean(-1).sqrt()  # (N,)
    length = mean.squeeze(1).norm(dim=-1)
    return length / (length + spread).clamp_min(1e-6)


class Words(NamedTuple):
    """What N prompts ask for. Indices are -1, numbers NaN and directions zero where the prompt does not say."""

    background: Tensor  # (N,) index
    colour: Tensor  # (N,) index
    shape: Tensor  # (N,) index
    direction: Tensor  # (N, 2) unit vector x, y
    speed: Tensor  # (N,) px a frame


def read_words(prompts: Sequence[str], device: torch.device | str = "cpu") -> Words:
    """Read the words that the oracle can judge; everything else in a prompt is ignored."""
    lists = ["".join(c if c.isalpha() else " " for c in p.lower()).replace("grey", "gray").split() for p in prompts]

    def first(table) -> Tensor:
        names = list(table)
        return torch.tensor([next((names.index(w) for w in words if w in names), -1) for words in lists], device=device)

    steps = [[sum(STEPS[w][axis] for w in words if w in STEPS) for axis in range(2)] for words in lists]
    direction = F.normalize(torch.tensor(steps, device=device, dtype=torch.float32), dim=-1)  # zero stays zero
    speed = [next((SPEEDS[w] for w in words if w in SPEEDS), math.nan) for words in lists]
    return Words(first(BACKGROUNDS), first(COLOURS), first(SHAPES), direction, torch.tensor(speed, device=device))


def direction_cosine(seen: SpriteMeasures, said: Words) -> Tensor:
    """Cosine between the motion and the direction of the prompt: (N,), 1 where the prompt names none."""
    cosine = (seen.velocity * said.direction).sum(-1) / seen.speed.clamp_min(1e-6)
    return torch.where(_named_direction(said), cosine, torch.ones_like(cosine))


def _named_direction(said: Words) -> Tensor:
    return said.direction.square().sum(-1) > 0


Judge = Callable[[SpriteMeasures, Words], tuple[Tensor, dict[str, Tensor]]]


class SpriteReward(Reward):
    """A judge of (measures, words) as a reward: its number where the sprite is valid, 0 elsewhere."""

    def __init__(self, name: str, judge: Judge):
        self.name, self.judge = name, judge

    def score(self, clips: Sequence[Clip]) -> Scores:
        if any(clip.video.shape != clips[0].video.shape for clip in clips):
            return _joined([self.score([clip]) for clip in clips])
        seen = measure(torch.stack([clip.video for clip in clips]))
        said = read_words([clip.prompt for clip in clips], seen.valid.device)
        number, dims = self.judge(seen, said)
        total = torch.where(seen.valid, number, torch.zeros_like(number))
        always = {"valid": seen.valid.float(), "area": seen.area.mean(-1), "speed": seen.speed}
        return Scores(total.float(), {**always, **{name: values.float() for name, values in dims.items()}})


def _joined(parts: Sequence[Scores]) -> Scores:
    dims = {name: torch.cat([part.dims[name] for part in parts]) for name in parts[0].dims}
    return Scores(torch.cat([part.total for part in parts]), dims)


def _right(seen: Tensor, said: Tensor) -> Tensor:
    """1 where an index is the one that the prompt names, or where it names none."""
    return ((seen == said) | (said < 0)).float()


def _closeness(seen: Tensor, said: Tensor, names: Table) -> Tensor:
    """(1 - distance in RGB)+ from the named colour; 1 where none is named. seen: (N, 3), said: (N,)."""
    table = seen.new_tensor(list(names.values()))
    close = (1 - (seen - table[said.clamp_min(0)]).norm(dim=-1)).clamp_min(0)
    return torch.where(said < 0, torch.ones_like(close), close)


def sprite_colour() -> SpriteReward:
    """How close the sprite's colour is to the named one, in [0, 1]."""

    def judge(seen: SpriteMeasures, said: Words):
        return _closeness(seen.colour, said.colour, COLOURS), {"colour": _right(seen.colour_index, said.colour)}

    return SpriteReward("sprite_colour", judge)


def sprite_background() -> SpriteReward:
    """How close the background's colour is to the named one, in [0, 1]."""

    def judge(seen: SpriteMeasures, said: Words):
        close = _closeness(seen.background, said.background, BACKGROUNDS)
        return close, {"background": _right(seen.background_index, said.background)}

    return SpriteReward("sprite_background", judge)


def sprite_shape(sharpness: float = 20.0) -> SpriteReward:
    """Probability of the named shape, a softmax of `sharpness` x overlap with each ideal shape."""

    def judge(seen: SpriteMeasures, said: Words):
        share = (sharpness * seen.shape_scores).softmax(-1).gather(-1, said.shape.clamp_min(0)[:, None]).squeeze(-1)
        overlap = seen.shape_scores.max(-1).values
        total = torch.where(said.shape < 0, torch.ones_like(share), share)
        return total, {"shape": _right(seen.shape_index, said.shape), "overlap": overlap}

    return SpriteReward("sprite_shape", judge)


def sprite_motion(speed: float = 1.35, area: float | None = 108.6, guard: float = 1.0) -> SpriteReward:
    """Move at `speed` px a frame the way the prompt says: (1 - |v - speed| / 0.9)+ x cos(direction), in [-1, 1].

    Minus guard x (|area of the sprite / `area` - 1| - 0.15)+, since a sprite that grows is easier to move than one
    that stays. `area` is the mean of the shipped base model; None switches the guard off.
    """

    def judge(seen: SpriteMeasures, said: Words):
        cosine = direction_cosine(seen, said)
        number = (1 - (seen.speed - speed).abs() / 0.9).clamp_min(0) * cosine
        excess = torch.zeros_like(number)
        if area is not None:
            excess = ((seen.area.mean(-1) / area - 1).abs() - 0.15).clamp_min(0)
        return number - guard * excess, {"cosine": cosine, "area_excess": excess}

    return SpriteReward("sprite_motion", judge)


def sprite_smoothness() -> SpriteReward:
    """How even the path is, in [0, 1]; a sprite that stands still scores near 0."""

    def judge(seen: SpriteMeasures, said: Words):
        return seen.smoothness, {"cosine": direction_cosine(seen, said)}

    return SpriteReward("sprite_smoothness", judge)


def sprite_match() -> SpriteReward:
    """Share of the attributes named in the prompt that are right; 1 where it names none."""

    def judge(seen: SpriteMeasures, said: Words):
        readings = match_readings(seen, said)
        share = torch.stack(list(readings.values())).nanmean(0).nan_to_num(1.0)
        return share, {name: values.nan_to_num(1.0) for name, values in readings.items()}

    return SpriteReward("sprite_match", judge)


def match_readings(seen: SpriteMeasures, said: Words) -> dict[str, Tensor]:
    """1 or 0 for each attribute, NaN where the prompt does not name it: name -> (N,)."""
    speeds = seen.speed.new_tensor(list(SPEEDS.values()))
    nearest = speeds[(seen.speed[:, None] - speeds).abs().argmin(-1)]
    heading = direction_cosine(seen, said) > math.cos(math.pi / 8)  # the nearest of eight directions
    right = {
        "colour": (seen.colour_index == said.colour, said.colour >= 0),
        "shape": (seen.shape_index == said.shape, said.shape >= 0),
        "background": (seen.background_index == said.background, said.background >= 0),
        "motion": (heading & (seen.speed > 0.2), _named_direction(said)),
        "speed": (nearest == said.speed, said.speed.isfinite()),
    }
    return {name: torch.where(named, hit.float(), math.nan) for name, (hit, named) in right.items()}
