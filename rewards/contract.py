"""What a reward is: clips in, named scores out, and the one place where a question and its answer are checked.

F frames, H W pixels, N clips, S segments
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

Scope = Literal["clip", "group", "batch"]
SCOPES: tuple[Scope, ...] = ("clip", "group", "batch")  # from the narrowest to the widest
Answer = TypeVar("Answer")
OVERSHOOT = 0.1  # a resizing filter or a VAE may leave [0, 1] by a little; videos in [-1, 1] or [0, 255] do by more


class RewardError(ValueError):
    """A reward that cannot be loaded, that is asked something impossible, or that answers with something else."""


def one_line(reason: object) -> str:
    """What an exception or a stranger says, in one printable line of 300 characters at most."""
    return "".join(c if c.isprintable() else "?" for c in " ".join(str(reason).split())[:300])


@dataclass(frozen=True)
class Clip:
    """One video and what it was made for."""

    video: Tensor  # (F, 3, H, W) float in [0, 1]; keeps its graph when the reward is differentiable
    prompt: str
    fps: float = 16.0
    group: int = 0  # clips of one prompt share it
    meta: Mapping[str, Any] = field(default_factory=dict)

    def frames(self, indices: Sequence[int]) -> Clip:
        """These frames of the clip alone; the frame rate falls so that the duration stays."""
        return replace(self, video=self.video[list(indices)], fps=self.fps * len(indices) / len(self.video))


@dataclass
class Scores:
    """One reward's answer for N clips."""

    total: Tensor  # (N,) float32, what the advantage is computed from
    dims: dict[str, Tensor] = field(default_factory=dict)  # further readings, name -> (N,)
    dense: Tensor | None = None  # (N, S) per frame or segment
    valid: Tensor | None = None  # (N,) bool; a failed call is False here, never a number in total


class Reward:
    """A callable from clips to scores. A subclass writes `score`; what is called is `reward(...)`, which checks.

        reward(clips)                            # rewards.Clip objects
        reward(videos, prompts, fps=16.0)        # (N, F, 3, H, W) or a list of (F, 3, H, W), in [0, 1]

    A plain function or any object with the three attributes below becomes one through `lift`, as `load` does.
    """

    name: str = "reward"
    scope: Scope = "clip"  # what has to be seen in one call: each clip alone, all clips of a prompt, or everything
    differentiable: bool = False  # False: runs without gradients

    def score(self, clips: Sequence[Clip]) -> Scores | Awaitable[Scores]:
        """Score N clips of any sizes and lengths; an `async def` is awaited, side by side with other rewards."""
        raise NotImplementedError(f"{type(self).__name__} does not implement score(clips)")

    def indices(self, length: int, fps: float) -> list[int]:
        """The frames that the reward looks at in a clip of `length` frames; all others may be left out."""
        return list(range(length))

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(self.score)

    def __call__(
        self,
        videos: Tensor | Sequence[Tensor] | Sequence[Clip],
        prompts: Sequence[str] | None = None,
        fps: float | Sequence[float] = 16.0,
    ) -> Scores:
        """Score clips, or videos with their prompts.

        Returns: Scores with float32 totals, a boolean `valid`, and no number where `valid` is False (NaN there).
            A total that is not finite counts as invalid.
        Raises: RewardError where a clip or the answer has the wrong type or shape.
        """
        clips = self._clips(videos, prompts, fps)
        with _gradients(self.differentiable):  # also while the answer is waited for
            answer = settled(self._started(clips))
        return self._checked(answer, len(clips))

    def _started(self, clips: Sequence[Clip]) -> Scores | Awaitable[Scores]:
        self._check_clips(clips)
        with _gradients(self.differentiable):
            return self.score(clips)

    def _clips(self, videos: Any, prompts: Any, fps: Any) -> Sequence[Clip]:
        if prompts is None:
            clips = list(videos)
            if not all(isinstance(clip, Clip) for clip in clips):
                raise RewardError(f"reward {self.name}: called with videos but no prompts; give one prompt a video")
            return clips
        if isinstance(prompts, str) or len(prompts) != len(videos):
            given = "one string" if isinstance(prompts, str) else f"{len(prompts)} prompts"
            raise RewardError(f"reward {self.name}: {len(videos)} videos and {given}; give a list, one prompt a video")
        rates = [float(fps)] * len(videos) if isinstance(fps, (int, float)) else [float(rate) for rate in fps]
        if len(rates) != len(videos):
            raise RewardError(f"reward {self.name}: {len(videos)} videos and {len(rates)} rates; give one rate a video")
        group = {prompt: index for index, prompt in enumerate(dict.fromkeys(prompts))}
        rows = zip(videos, prompts, rates, strict=True)
        return [Clip(video, prompt, rate, group[prompt]) for video, prompt, rate in rows]

    def _check_clips(self, clips: Sequence[Clip]) -> None:
        if not clips:
            raise RewardError(f"reward {self.name}: called with no clips")
        for clip in clips:
            video = clip.video
            if not isinstance(video, Tensor) or not isinstance(clip.prompt, str):
                raise RewardError(
                    f"reward {self.name}: a clip's video is a {type(video).__name__} and its prompt a "
                    f"{type(clip.prompt).__name__}, expected a tensor and a str"
                )
            if video.ndim != 4 or video.shape[1] != 3 or 0 in video.shape or not video.is_floating_point():
                raise RewardError(
                    f"reward {self.name}: a clip's video is {video.dtype} {tuple(video.shape)}, expected (F, 3, H, W) "
                    "float in [0, 1]; move channels to axis 1 and divide bytes by 255"
                )
            if not clip.fps > 0:
                raise RewardError(f"reward {self.name}: a clip has {clip.fps} frames a second")
        device = clips[0].video.device
        bounds = [torch.stack(clip.video.detach().aminmax()).float().to(device) for clip in clips]
        for clip, (low, high) in zip(clips, torch.stack(bounds).tolist(), strict=True):  # NaN anywhere makes both NaN
            if not (low >= -OVERSHOOT and high <= 1 + OVERSHOOT):
                raise RewardError(
                    f"reward {self.name}: the video of {clip.prompt[:80]!r} has pixels from {low:.3g} to {high:.3g}, "
                    "expected [0, 1] without NaN"
                )

    def _checked(self, answer: Any, num: int) -> Scores:
        if not isinstance(answer, Scores):
            raise RewardError(f"reward {self.name}: returned {type(answer).__name__}, expected rewards.Scores")
        if not isinstance(answer.dims, Mapping):
            raise RewardError(f"reward {self.name}: dims is a {type(answer.dims).__name__}, expected names and values")
        self._check_shape("total", answer.total, (num,))
        for name, values in answer.dims.items():
            self._check_shape(f"dims[{name!r}]", values, (num,))
        if answer.dense is not None:
            segments = answer.dense.shape[1:2] if isinstance(answer.dense, Tensor) else ()
            self._check_shape("dense", answer.dense, (num, *(segments or ("S",))))
        total = answer.total.float()
        valid = torch.isfinite(total)
        if answer.valid is not None:
            self._check_shape("valid", answer.valid, (num,))
            valid = valid & answer.valid.to(total.device, torch.bool)
        total = torch.where(valid, total, total.new_full((), float("nan")))
        return Scores(total, {name: v.float() for name, v in answer.dims.items()}, answer.dense, valid)

    def _check_shape(self, what: str, values: Any, shape: tuple[int | str, ...]) -> None:
        found = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        if found != shape:
            raise RewardError(f"reward {self.name}: {what} has shape {found}, expected {shape}, one value a clip")


class LiftedFunction(Reward):
    """A plain `f(videos, prompts)` as a reward of scope "clip"."""

    def __init__(self, function: Callable[[Tensor, list[str]], Any], name: str, differentiable: bool = False):
        self.function, self.name, self.differentiable = function, name, differentiable

    def score(self, clips: Sequence[Clip]) -> Scores:
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


class LiftedObject(Reward):
    """An object with the attributes of a reward and a `__call__(clips)` of its own; see `inner`."""

    def __init__(self, inner: Any):
        self.inner = inner
        self.name, self.scope, self.differentiable = inner.name, inner.scope, inner.differentiable

    @property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(type(self.inner).__call__)

    def score(self, clips: Sequence[Clip]) -> Scores | Awaitable[Scores]:
        return self.inner(clips)


def is_reward(candidate: Any) -> bool:
    """Whether an object carries the three attributes of a reward already."""
    return all(hasattr(candidate, attribute) for attribute in ("name", "scope", "differentiable"))


def lift(function: Callable, name: str | None = None, differentiable: bool = False) -> Reward:
    """Make a reward of a callable; one that is a `Reward` stays as it is.

    An object with attributes `name`, `scope` and `differentiable` is called with clips and returns `Scores`. Any other
    callable is a function of videos (N, F, 3, H, W) in [0, 1], all of one shape, and N prompts, and returns N numbers;
    NaN marks a clip that it could not judge. It runs without gradients unless it is said to be differentiable.

    Raises: RewardError for a scope that is none.
    """
    if is_reward(function) and function.scope not in SCOPES:
        raise RewardError(f"reward {function.name}: scope is {function.scope!r}, expected one of {', '.join(SCOPES)}")
    if isinstance(function, Reward):
        return function
    if is_reward(function):
        return LiftedObject(function)
    return LiftedFunction(function, name or getattr(function, "__name__", type(function).__name__), differentiable)


def answers(rewards: Mapping[str, Reward], clips: Sequence[Clip]) -> dict[str, Scores | Exception]:
    """What several rewards say of the same clips: asynchronous ones run side by side while the others compute.

    Returns: name -> Scores, or the exception that the reward raised; one that fails does not stop the others.
    """
    waiting = {name: reward for name, reward in rewards.items() if reward.is_async}
    found = {}
    with ThreadPoolExecutor(max_workers=1) as pool:
        with _gradients(any(reward.differentiable for reward in waiting.values())):
            background = pool.submit(_run, _gathered(waiting, clips), torch.is_grad_enabled())
        for name, reward in rewards.items():
            if name not in waiting:
                try:
                    found[name] = reward(clips)
                except Exception as error:  # a user's reward may raise anything; the caller says which it was
                    found[name] = error
        found |= background.result()
    return {name: found[name] for name in rewards}


async def _gathered(rewards: Mapping[str, Reward], clips: Sequence[Clip]) -> dict[str, Scores | Exception]:
    async def one(reward: Reward) -> Scores:
        return reward._checked(await reward._started(clips), len(clips))

    found = await asyncio.gather(*(one(reward) for reward in rewards.values()), return_exceptions=True)
    return dict(zip(rewards, found, strict=True))


def settled(answer: Answer | Awaitable[Answer]) -> Answer:
    """An answer, waited for where it is awaitable; also under a running event loop, as in a notebook."""
    if not inspect.isawaitable(answer):
        return answer
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run(answer, torch.is_grad_enabled())
    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(_run, answer, torch.is_grad_enabled()).result()


def _run(answer: Awaitable[Answer], gradients: bool) -> Answer:
    """Wait in an event loop of its own; every thread begins with gradients, whatever those of its maker are."""

    async def wait() -> Answer:
        return await answer

    with torch.set_grad_enabled(gradients):
        return asyncio.run(wait())


def _gradients(differentiable: bool) -> torch.set_grad_enabled:
    """Gradients where the caller and the reward have them."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and differentiable)
