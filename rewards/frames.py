"""Video from frames: which frames of a clip a reward of images sees, and how their scores become one.

from rewards import load, per_frame
reward = per_frame(my_image_reward, frames=4, select="segment", weights="attenuated")
reward = load("hpsv2", path="HPS_v2.1_compressed.pt", frames=16, weights={"best": 0.3})     # the same options

F frames of a clip, S scored frames of a clip, N clips, M scored frames of all clips of a call
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Awaitable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewards.contract import Clip, Reward, RewardError, Scores, lift

SELECTIONS = ("uniform", "segment", "first", "all")
RULES = {"mean": None, "best": 0.3, "attenuated": 1.0, "attenuated_mean": 1.0}  # rule -> its number where none is given
FINGERPRINT = 16  # rows and columns of pixels that a random draw depends on


class FramePlan(NamedTuple):
    """Which frames of a clip are scored, and how much each counts; see `per_frame`."""

    frames: int | None
    select: str
    rule: str
    number: float | None  # the rule's share or decay
    seed: int

    def chosen(self, video: Tensor) -> list[int]:
        """Indices of the S frames of a clip (F, 3, H, W) that are scored, rising."""
        return segment_indices(video, self.frames, self.seed) if self.select == "segment" else self.fixed(len(video))

    def fixed(self, length: int) -> list[int]:
        """The same where nothing is drawn."""
        counts = {"uniform": self.frames, "first": 1, "all": None}
        return frame_indices(length, counts[self.select])

    def needed(self, length: int) -> list[int]:
        """Indices of the frames without which the score would be another, in a clip of `length` frames."""
        if self.select == "segment" or self.rule.startswith("attenuated"):
            return list(range(length))  # the draw, or the distance to the middle, depends on the whole clip
        return self.fixed(length)

    def weights(self, scores: Tensor, indices: Sequence[int], length: int) -> Tensor:
        """(S,) weights of the scored frames of a clip of `length` frames; the clip's score is their sum product."""
        count = len(indices)
        if self.rule == "best":
            kept = max(1, math.floor(self.number * count + 1e-9))
            return torch.zeros_like(scores).index_fill_(0, scores.detach().topk(kept).indices, 1 / kept)
        if self.rule == "mean":
            return torch.full_like(scores, 1 / count)
        distance = torch.tensor([abs(index - length // 2) for index in indices], device=scores.device).float()
        if self.rule == "attenuated_mean":
            return torch.softmax(-self.number * distance, 0).to(scores)
        return torch.exp(-self.number * distance).to(scores) / count


def frame_plan(
    where: str,
    frames: int | None = 8,
    select: str = "uniform",
    weights: str | Mapping[str, float] = "mean",
    seed: int = 0,
) -> FramePlan:
    """Read the options of `per_frame`. Raises: RewardError, one line."""
    if frames is not None and (isinstance(frames, bool) or not isinstance(frames, int) or frames < 1):
        raise RewardError(f"reward {where}: frames is {frames!r}, expected a positive number, or null for all")
    if select not in SELECTIONS:
        raise RewardError(f"reward {where}: select is {select!r}, expected one of {', '.join(SELECTIONS)}")
    if select == "segment" and frames is None:
        raise RewardError(f"reward {where}: select is 'segment', so frames must say how many segments there are")
    rule, number = _rule(where, weights)
    return FramePlan(frames, select, rule, number, seed)


def _rule(where: str, weights: str | Mapping[str, float]) -> tuple[str, float | None]:
    rules = {weights: RULES.get(weights)} if isinstance(weights, str) else dict(weights)
    rule, number = next(iter(rules.items())) if len(rules) == 1 else (None, None)
    if rule not in RULES or (rule == "mean") != (number is None):
        raise RewardError(
            f"reward {where}: weights is {weights!r}, expected one of {', '.join(RULES)}, or {{best: share}}, "
            "{attenuated: decay} or {attenuated_mean: decay}"
        )
    if rule != "mean" and not (isinstance(number, (int, float)) and 0 <= number < math.inf):
        raise RewardError(
            f"reward {where}: the number of weights {rule} is {number!r}, expected one that is not below 0"
        )
    if rule == "best" and not 0 < number <= 1:
        raise RewardError(f"reward {where}: the share of best frames is {number}, expected one above 0 and at most 1")
    return rule, number


def frame_indices(length: int, frames: int | None) -> list[int]:
    """Indices of at most `frames` evenly spaced frames, first and last included; of all for None."""
    if frames is None or frames >= length:
        return list(range(length))
    return torch.linspace(0, length - 1, frames, dtype=torch.float64).round().long().tolist()


def segment_indices(video: Tensor, segments: int, seed: int) -> list[int]:
    """One random frame of each of S segments of F // S frames; the F mod S frames that remain are never drawn.

    The draw is a function of the seed and of the pixels, in steps of 1 / 255 on a coarse grid: the same clip gets the
    same frames in every batch, process and run, and clips of different content get different ones.

    Args: video: (F, 3, H, W) in [0, 1]. A clip of fewer frames than segments has F segments.
    Source: InstructVideo (arXiv 2311.12490), Segmental Video Reward.
    """
    length, height, width = len(video), *video.shape[-2:]
    segments = min(segments, length)
    span = length // segments
    grid = video.detach()[:, :, :: math.ceil(height / FINGERPRINT), :: math.ceil(width / FINGERPRINT)]
    pixels = (grid.float() * 255).round().clamp(0, 255).to(torch.uint8).cpu().contiguous()
    digest = hashlib.shake_256(f"{seed} {tuple(video.shape)} ".encode() + pixels.numpy().tobytes()).digest(8 * segments)
    draws = [int.from_bytes(digest[8 * s : 8 * s + 8], "little") for s in range(segments)]
    return [segment * span + draw % span for segment, draw in enumerate(draws)]


class FrameReward(Reward):
    """A reward of clips made of one of images. A subclass writes `score_frames`; see `per_frame` for the options."""

    def __init__(self, name: str, plan: FramePlan):
        self.name, self.plan = name, plan

    def score_frames(self, frames: Sequence[Clip]) -> Scores | Awaitable[Scores]:
        """Score M clips of one frame each, of any sizes; NaN marks one that could not be judged."""
        raise NotImplementedError(f"{type(self).__name__} does not implement score_frames(frames)")

    def indices(self, length: int, fps: float) -> list[int]:
        return self.plan.needed(length)

    def score(self, clips: Sequence[Clip]) -> Scores | Awaitable[Scores]:
        chosen = [self.plan.chosen(clip.video) for clip in clips]
        answer = self.score_frames(
            [frame for clip, indices in zip(clips, chosen, strict=True) for frame in _singles(clip, indices)]
        )
        if inspect.isawaitable(answer):
            return self._later(answer, clips, chosen)
        return self._combined(answer, clips, chosen)

    async def _later(self, answer: Awaitable[Scores], clips: Sequence[Clip], chosen: list[list[int]]) -> Scores:
        return self._combined(await answer, clips, chosen)

    def _combined(self, scores: Scores, clips: Sequence[Clip], chosen: list[list[int]]) -> Scores:
        counts = [len(indices) for indices in chosen]
        frames = scores.total.split(counts)  # N of (S,)
        rows = zip(frames, chosen, clips, strict=True)
        weights = torch.cat([self.plan.weights(row, indices, len(clip.video)) for row, indices, clip in rows])  # (M,)

        def merged(values: Tensor) -> Tensor:  # (M,) -> (N,); NaN, also where its weight is 0, makes NaN
            return torch.stack([part.sum() for part in (weights.to(values) * values).split(counts)])

        dims = {name: merged(values) for name, values in scores.dims.items()}
        return Scores(merged(scores.total), dims, torch.stack(frames) if len(set(counts)) == 1 else None)


class PerFrame(FrameReward):
    """Any reward, asked about single frames; see `per_frame`."""

    def __init__(self, inner: Reward, name: str, plan: FramePlan):
        super().__init__(name, plan)
        self.inner, self.differentiable = inner, inner.differentiable

    @property
    def is_async(self) -> bool:
        return self.inner.is_async

    def score_frames(self, frames: Sequence[Clip]) -> Scores | Awaitable[Scores]:
        return self._awaited(frames) if self.is_async else self.inner(frames)

    async def _awaited(self, frames: Sequence[Clip]) -> Scores:
        return self.inner._checked(await self.inner._started(frames), len(frames))


def per_frame(
    image_reward: Any,
    frames: int | None = 8,
    select: str = "uniform",
    weights: str | Mapping[str, float] = "mean",
    seed: int = 0,
    name: str | None = None,
) -> Reward:
    """Make a reward of clips of one of images, which is asked about all frames of a call at once, as one-frame clips.

    `total` is sum_i w_i s_i over the scored frames, `dense` (N, S) holds the s_i (None where clips differ in S), `dims`
    are weighted like the total. A frame without a valid score makes its clip invalid. Differentiable if the image
    reward is.

    Args:
        image_reward: a `Reward` of scope "clip", or what `lift` makes one of.
        frames: how many frames of a clip are scored; all if null or if a clip has no more.
        select: "uniform" (evenly spaced, first and last included), "segment" (a random one of each of `frames` equal
            segments, the same for the same pixels and seed), "first", or "all".
        weights: "mean";
            "best", {best: share}: the mean of the best share of frames, rounded down, at least one (0.3);
            "attenuated", {attenuated: decay}: w_i = exp(-decay |g_i - F // 2|) / S for frame g_i of F, as InstructVideo
            has it, so that the total is small where frames are far from the middle (1.0);
            "attenuated_mean", {attenuated_mean: decay}: the same, divided by their sum instead of S.
        seed: of the segments' draws.
    Raises: RewardError for a wrong option.
    Source: InstructVideo (arXiv 2311.12490), Segmental Video Reward and Temporally Attenuated Reward.
    """
    inner = lift(image_reward)
    name = name or inner.name
    if inner.scope != "clip":
        raise RewardError(
            f"reward {name}: has scope {inner.scope!r}, but single frames are judged alone (scope 'clip')"
        )
    return PerFrame(inner, name, frame_plan(name, frames, select, weights, seed))


# What `rewards.check` asks.
per_frame.check = lambda image_reward, name=None, **options: frame_plan(name or "per_frame", **options)


def _singles(clip: Clip, indices: Sequence[int]) -> list[Clip]:
    """Clips of one frame each, picked at once so that the gradient of the video is written once."""
    picked = clip.frames(indices)
    return [replace(picked, video=frame, fps=picked.fps / len(indices)) for frame in picked.video.split(1)]
