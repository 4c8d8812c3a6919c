"""Judges of one clip: scores in words (`vlm_score`), and the probability of a yes (`vlm_yes`).

F frames, H W pixels, N clips
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.contract import Clip, Reward, RewardError, Scores
from rewards.frames import frame_indices
from rewards.judges.answers import SCALES, Scale, expression, read_scores, read_soft_scores, read_yes
from rewards.judges.backends import check_chat, open_chat
from rewards.judges.chat import CallFailed, Frame, Message
from rewards.judges.templates import load_template, read_text, render
from rewards.video_files import read_video

MAX_LOGPROBS = 20  # what vLLM allows unless told otherwise


def shown(clip: Clip, frames: int | None) -> list[Frame]:
    """The evenly spaced frames of a clip that a judge sees."""
    video = clip.video[frame_indices(len(clip.video), frames)].detach().float()
    return [Frame(pixels) for pixels in (video.clamp(0, 1) * 255).round().byte().cpu()]


def check_common(name: str, frames: int | None, max_tokens: int, cache: Any, system: Any) -> str | None:
    """Validate what all judges share. Returns: the system message. Raises: RewardError, one line."""
    for option, value in (("frames", 1 if frames is None else frames), ("max_tokens", max_tokens)):
        if not isinstance(value, int) or value < 1:
            raise RewardError(f"reward {name}: {option} is {value!r}, expected a positive whole number")
    if cache is not None and Path(cache).exists() and not Path(cache).is_dir():
        raise RewardError(f"reward {name}: cache {cache} is a file, expected a folder")
    return None if system is None else read_text(name, "system", system)


class VLMScore(Reward):
    """A judge that writes numbers for one clip; `total` is the mean of `dims`.

    Args:
        style: how the answer looks; decides dims, pattern and scale, each of which can be given instead:
            "unified": "Alignment Score (1-5): 4", likewise Physics and Style (UnifiedReward);
            "final": "Final Score: 4";
            "videoscore2": "visual quality: 4", "text-to-video alignment: 4",
                "physical/common-sense consistency: 4" after a chain of thought (VideoScore2, whose authors sample at
                temperature 0.7, which makes the score a random one).
        dims: name -> how the answer calls it, e.g. {"coherence": "Coherence"}; or a list, where both are the same.
        pattern: regular expression of one score; {dim} stands for what the answer calls it, {number} for the number.
        scale: lowest and highest number, [1, 5].
        normalise: maps the scale to [0, 1]; False: the numbers as they are.
        soft: VideoScore2's soft score, from log-probabilities; see `answers.read_soft_scores`. It lies between 0 and
            the highest number, so that normalising divides by the highest number.
        frames: frames shown, evenly spaced from first to last; None: all.
        template: file with the prompt: {prompt}, {video}; see `templates`. A published judge is asked with that of its
            authors.
        system: file with a system message.
        max_tokens: of the answer; one that is cut off is a failed call.
        cache: folder in which answers are kept.
        chat: model; with url, an OpenAI-compatible server: api_key_env, temperature, seed, concurrency, timeout,
            retries, backoff, image_format, extra (see `Endpoint`); else the model runs here: device, dtype.
    """

    def __init__(
        self,
        style: str = "unified",
        *,
        dims: Mapping[str, str] | Sequence[str] | None = None,
        pattern: str | None = None,
        scale: Sequence[float] | None = None,
        normalise: bool = True,
        soft: bool = False,
        frames: int | None = 8,
        template: str | None = None,
        system: str | None = None,
        max_tokens: int = 1024,
        cache: str | None = None,
        name: str = "vlm_score",
        **chat: Any,
    ):
        own = {"dims": dims, "pattern": pattern, "scale": scale, "frames": frames, "template": template}
        own |= {"system": system, "max_tokens": max_tokens, "cache": cache, "name": name}
        self.scale, self.template, system = self.check(style, **own, **chat)
        self.name, self.normalise, self.soft = name, normalise, soft
        self.frames, self.max_tokens = frames, max_tokens
        self.chat = open_chat(name, cache, system, chat)

    @staticmethod
    def check(
        style: str = "unified",
        *,
        dims: Mapping[str, str] | Sequence[str] | None = None,
        pattern: str | None = None,
        scale: Sequence[float] | None = None,
        normalise: bool = True,
        soft: bool = False,
        frames: int | None = 8,
        template: str | None = None,
        system: str | None = None,
        max_tokens: int = 1024,
        cache: str | None = None,
        name: str = "vlm_score",
        **chat: Any,
    ) -> tuple[Scale, str, str | None]:
        """Validate the options without network and weights. Returns: scale, template, system message."""
        if style not in SCALES:
            raise RewardError(f"reward {name}: style {style!r} is not one of {', '.join(SCALES)}")
        found = _scale(name, SCALES[style], dims, pattern, scale)
        given = {"dims": dims, "pattern": pattern, "scale": scale}
        changed = [option for option, value in given.items() if value is not None]
        if changed and template is None:
            raise RewardError(
                f"reward {name}: {' and '.join(changed)} need a template of yours that asks for such answers"
            )
        text = load_template(name, template, f"score_{style}.txt", ("video",))
        system = check_common(name, frames, max_tokens, cache, system)
        check_chat(name, chat)
        return found, text, system

    def indices(self, length: int, fps: float) -> list[int]:
        return frame_indices(length, self.frames)

    async def score(self, clips: Sequence[Clip]) -> Scores:
        answers = await asyncio.gather(*(self.chat.attempt(self._judge(clip)) for clip in clips))
        self.chat.report()
        rows = [answer or dict.fromkeys(self.scale.labels, float("nan")) for answer in answers]
        device = clips[0].video.device
        dims = {label: torch.tensor([row[label] for row in rows], device=device) for label in self.scale.labels}
        return Scores(torch.stack(list(dims.values())).mean(0), dims)

    async def _judge(self, clip: Clip) -> dict[str, float]:
        parts = render(self.template, {"prompt": clip.prompt}, {"video": shown(clip, self.frames)})
        read = read_soft_scores if self.soft else read_scores
        found = await self.chat.ask(
            [Message("user", parts)],
            lambda reply: read(reply, self.scale),
            self.max_tokens,
            MAX_LOGPROBS if self.soft else 0,
        )
        low = 0.0 if self.soft else self.scale.low
        if not self.normalise:
            return found
        return {name: (value - low) / (self.scale.high - low) for name, value in found.items()}


def _scale(name: str, style: Scale, dims: Any, pattern: str | None, scale: Any) -> Scale:
    labels = style.labels if dims is None else dict(dims if isinstance(dims, Mapping) else zip(dims, dims, strict=True))
    try:
        low, high = (style.low, style.high) if scale is None else (float(value) for value in scale)
    except (TypeError, ValueError) as error:
        raise RewardError(f"reward {name}: scale is {scale!r}, expected [lowest, highest]") from error
    if not labels or not low < high:
        raise RewardError(f"reward {name}: dims {labels} and scale [{low:g}, {high:g}] leave nothing to score")
    found = Scale(style.pattern if pattern is None else pattern, labels, low, high)
    needed = ["{number}"] + ["{dim}"] * (len(labels) > 1)
    missing = [place for place in needed if place not in found.pattern]
    if missing:
        raise RewardError(f"reward {name}: pattern {found.pattern!r} lacks {', '.join(missing)}")
    try:
        expression(found, next(iter(labels.values())))
    except re.error as error:
        raise RewardError(f"reward {name}: pattern {found.pattern!r} is no regular expression: {error}") from error
    return found


class VLMYes(Reward):
    """P(yes) in [0, 1]: the probability of "yes" against "no" as the first token of the answer, in any spelling.

    With a reference the judge sees it first, and says whether the clip is the better one, as in RewardDance (arXiv
    2509.08826). `clip.meta["reference"]`, a file or a tensor (F, 3, H, W) in [0, 1], goes before the option.
    The judge must answer at once: a model that thinks first gives neither word, which is a failed call.

    Args:
        reference: image or video file; True where every clip brings its own.
        template: file with the question: {prompt}, {video} and, with a reference, {reference}; see `templates`.
        top_logprobs: tokens among which the two are looked for; servers allow 20, as a rule.
        frames: frames shown, evenly spaced from first to last, of the reference as well; None: all.
        system: file with a system message.
        cache: folder in which answers are kept.
        chat: model; with url, an OpenAI-compatible server: api_key_env, temperature, seed, concurrency, timeout,
            retries, backoff, image_format, extra (see `Endpoint`); else the model runs here: device, dtype.
    """

    def __init__(
        self,
        *,
        reference: str | bool | None = None,
        template: str | None = None,
        top_logprobs: int = MAX_LOGPROBS,
        frames: int | None = 8,
        system: str | None = None,
        cache: str | None = None,
        name: str = "vlm_yes",
        **chat: Any,
    ):
        own = {"template": template, "top_logprobs": top_logprobs, "frames": frames, "system": system, "cache": cache}
        self.template, system = self.check(reference=reference, **own, name=name, **chat)
        self.name, self.frames, self.top_logprobs = name, frames, top_logprobs
        self.compares = bool(reference)
        self.reference = reference_frames(reference, frames) if isinstance(reference, str) else None
        self.chat = open_chat(name, cache, system, chat)

    @staticmethod
    def check(
        *,
        reference: str | bool | None = None,
        template: str | None = None,
        top_logprobs: int = MAX_LOGPROBS,
        frames: int | None = 8,
        system: str | None = None,
        cache: str | None = None,
        name: str = "vlm_yes",
        **chat: Any,
    ) -> tuple[str, str | None]:
        """Validate the options without network and weights. Returns: template, system message."""
        system = check_common(name, frames, 1, cache, system)
        if not isinstance(top_logprobs, int) or top_logprobs < 2:
            raise RewardError(f"reward {name}: top_logprobs is {top_logprobs!r}, expected 2 or more, for yes and no")
        if isinstance(reference, str) and not Path(reference).is_file():
            raise RewardError(f"reward {name}: no reference file {reference}")
        places = ("reference", "video") if reference else ("video",)
        text = load_template(name, template, "yes_reference.txt" if reference else "yes.txt", places)
        check_chat(name, chat)
        return text, system

    def indices(self, length: int, fps: float) -> list[int]:
        return frame_indices(length, self.frames)

    async def score(self, clips: Sequence[Clip]) -> Scores:
        answers = await asyncio.gather(*(self.chat.attempt(self._judge(clip)) for clip in clips))
        self.chat.report()
        values = [float("nan") if answer is None else answer for answer in answers]
        return Scores(torch.tensor(values, device=clips[0].video.device))

    async def _judge(self, clip: Clip) -> float:
        frames = {"video": shown(clip, self.frames)}
        if self.compares:
            frames = {"reference": self._reference(clip), **frames}
        parts = render(self.template, {"prompt": clip.prompt}, frames)
        return await self.chat.ask([Message("user", parts)], read_yes, 1, self.top_logprobs)

    def _reference(self, clip: Clip) -> list[Frame]:
        given = clip.meta.get("reference")
        if given is None:
            if self.reference is None:
                raise CallFailed("no reference", f"neither a file nor clip.meta for {clip.prompt[:80]!r}")
            return self.reference
        if isinstance(given, str):
            return reference_frames(given, self.frames)
        if not isinstance(given, Tensor):
            raise RewardError(
                f"reward {self.name}: clip.meta['reference'] is a {type(given).__name__}, expected a file or a tensor"
            )
        self._check_clips([Clip(given, clip.prompt)])
        return shown(Clip(given, clip.prompt), self.frames)


@lru_cache(maxsize=64)  # a file is compared with many clips
def reference_frames(file: str, frames: int | None) -> list[Frame]:
    """The evenly spaced frames of an image or video file. Raises: RewardError, one line."""
    video, _ = read_video(file)
    return [Frame(pixels) for pixels in video[frame_indices(len(video), frames)]]
