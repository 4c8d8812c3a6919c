"""What a reward is: a callable from clips to scores, and the one place where its answer is checked.

F frames, H W pixels, N clips, S segments
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


class RewardError(ValueError):
    """A reward that cannot be loaded, or that answers with something other than scores."""


@dataclass(frozen=True)
class Clip:
    """One video and what it was made for."""

    video: Tensor  # (F, 3, H, W) float in [0, 1]; keeps its graph when the reward is differentiable
    prompt: str
    fps: float = 16.0
    group: int = 0  # clips of one prompt share it
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Scores:
    """One reward's answer for N clips."""

    total: Tensor  # (N,) float32, what the advantage is computed from
    dims: dict[str, Tensor] = field(default_factory=dict)  # further readings, name -> (N,)
    dense: Tensor | None = None  # (N, S) per frame or segment
    valid: Tensor | None = None  # (N,) bool; a failed call is False here, never a number in total


class Reward(Protocol):
    """Any callable with these three attributes; `lift` gives them to a plain function."""

    name: str
    scope: Literal["clip", "group", "batch"]  # what has to be seen in one call
    differentiable: bool  # False: the caller runs it without gradients

    def __call__(self, clips: Sequence[Clip]) -> Scores | Awaitable[Scores]: ...


class LiftedReward:
    """A plain `f(videos, prompts)` as a reward of scope "clip"."""

    scope: Literal["clip", "group", "batch"] = "clip"

    def __init__(self, function: Callable[[Tensor, list[str]], Any], name: str, differentiable: bool = False):
        self.function, self.name, self.differentiable = function, name, differentiable

    def __call__(self, clips: Sequence[Clip]) -> Scores:
        shapes = {tuple(clip.video.shape) for clip in clips}
        if len(shapes) > 1:
            raise RewardError(
                f"reward {self.name}: clips of shapes {sorted(shapes)} in one call, but f(videos, prompts) takes one "
                "shape; write a class that is called with the clips"
            )
        total = self.function(torch.stack([clip.video for clip in clips]), [clip.prompt for clip in clips])
        try:
            return Scores(torch.as_tensor(total))
        except (TypeError, ValueError, RuntimeError) as error:
            raise RewardError(f"reward {self.name}: expected {len(clips)} numbers, one a clip: {error}") from error


def is_reward(candidate: Any) -> bool:
    """Whether an object carries the three attributes of a reward already."""
    return all(hasattr(candidate, attribute) for attribute in ("name", "scope", "differentiable"))


def lift(function: Callable, name: str | None = None, differentiable: bool = False) -> Reward:
    """Return `function` unchanged if it is a reward already, else lift `f(videos, prompts) -> (N,)`.

    A lifted function sees videos (N, F, 3, H, W) in [0, 1], all of one shape, and N prompts, and returns N numbers;
    NaN marks a clip that it could not judge. It runs without gradients unless it is said to be differentiable.
    """
    if is_reward(function):
        return function
    return LiftedReward(function, name or getattr(function, "__name__", type(function).__name__), differentiable)


def score(reward: Reward, clips: Sequence[Clip]) -> Scores:
    """Call a reward (synchronous or not) and check its answer.

    Returns: Scores with float32 totals, a boolean `valid`, and no number where `valid` is False (NaN there).
        A total that is not finite counts as invalid.
    Raises: RewardError where a clip or the answer has the wrong type or shape.
    """
    _check_clips(reward, clips)
    with torch.set_grad_enabled(torch.is_grad_enabled() and reward.differentiable):
        answer = reward(clips)
        if inspect.isawaitable(answer):
            answer = asyncio.run(_wait(answer))
    if not isinstance(answer, Scores):
        raise RewardError(f"reward {reward.name}: returned {type(answer).__name__}, expected rewards.Scores")
    num = len(clips)
    _check_shape(reward, "total", answer.total, (num,))
    for name, values in answer.dims.items():
        _check_shape(reward, f"dims[{name!r}]", values, (num,))
    if answer.dense is not None:
        segments = answer.dense.shape[1:2] if isinstance(answer.dense, Tensor) else ()
        _check_shape(reward, "dense", answer.dense, (num, *(segments or ("S",))))
    total = answer.total.float()
    valid = torch.isfinite(total)
    if answer.valid is not None:
        _check_shape(reward, "valid", answer.valid, (num,))
        valid = valid & answer.valid.to(total.device, torch.bool)
    total = torch.where(valid, total, total.new_full((), float("nan")))
    return Scores(total, {name: v.float() for name, v in answer.dims.items()}, answer.dense, valid)


async def _wait(answer: Awaitable[Scores]) -> Scores:
    return await answer


def _check_clips(reward: Reward, clips: Sequence[Clip]) -> None:
    if not clips:
        raise RewardError(f"reward {reward.name}: called with no clips")
    for clip in clips:
        video = clip.video
        if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape or not video.is_floating_point():
            raise RewardError(
                f"reward {reward.name}: a clip's video is {video.dtype} {tuple(video.shape)}, expected (F, 3, H, W) "
                "float in [0, 1]; move channels to axis 1 and divide bytes by 255"
            )


def _check_shape(reward: Reward, what: str, values: Any, shape: tuple[int | str, ...]) -> None:
    found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
    if found != shape:
        raise RewardError(f"reward {reward.name}: {what} has shape {found}, expected {shape}, one value a clip")
