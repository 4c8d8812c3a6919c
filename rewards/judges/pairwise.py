"""Judges of two clips, and the win rate that they make of a group (`vlm_pairwise`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from rewards.comparison import OVERALL, WinRate
from rewards.contract import Clip, RewardError, Scores
from rewards.frames import frame_indices
from rewards.judges.answers import read_categories, read_selection, read_winner
from rewards.judges.backends import check_chat, open_chat
from rewards.judges.chat import CallFailed, Chat, Frame, Message, Reply
from rewards.judges.pointwise import check_common, shown
from rewards.judges.templates import load_template, render

STYLES = ("think", "flex", "select")
PLACES = ("video_1", "video_2")
SHOWN = "frames shown to a judge"  # key of clip.meta, so that frames are prepared once and not in each comparison


class PairJudge:
    """Asked about two clips once, in the order given: {dimension: 1, 0.5 or 0}, or None where the call failed."""

    def __init__(self, chat: Chat, template: str, frames: int | None, max_tokens: int, categories: Sequence[str] = ()):
        self.chat, self.template, self.frames, self.max_tokens = chat, template, frames, max_tokens
        self.categories = list(categories)
        self.dims = [OVERALL, *self.categories]

    def indices(self, length: int, fps: float) -> list[int]:
        return frame_indices(length, self.frames)

    def prepared(self, clips: Sequence[Clip]) -> list[Clip]:
        """The same clips with their frames prepared."""
        return [replace(clip, meta={**clip.meta, SHOWN: shown(clip, self.frames)}) for clip in clips]

    def _shown(self, clip: Clip) -> list[Frame]:
        return clip.meta[SHOWN] if SHOWN in clip.meta else shown(clip, self.frames)

    async def __call__(self, first: Clip, second: Clip) -> dict[str, float] | None:
        return await self.chat.attempt(self._judge(first, second))

    async def _judge(self, first: Clip, second: Clip) -> dict[str, float]:
        frames = {place: self._shown(clip) for place, clip in zip(PLACES, (first, second), strict=True)}
        parts = render(self.template, {"prompt": first.prompt}, frames)
        return await self.chat.ask([Message("user", parts)], self._read, self.max_tokens)

    def _read(self, reply: Reply) -> dict[str, float]:
        return read_categories(reply, self.categories) if self.categories else read_winner(reply)


class SelectingJudge(PairJudge):
    """A judge that sees a few frames of each clip and may ask for more before it decides.

    Frames are numbered from 1 through both clips. Of the n of a clip, every (n / first_frames)-th is shown at first, as
    in VR-Thinker (arXiv 2510.10518, appendix).
    """

    def __init__(
        self, chat: Chat, template: str, frames: int | None, max_tokens: int, first_frames: int, turns: int, most: int
    ):
        super().__init__(chat, template, frames, max_tokens)
        self.first_frames, self.turns, self.most = first_frames, turns, most
        self.dims = [OVERALL, "TA", "VQ", "MQ"]

    async def _judge(self, first: Clip, second: Clip) -> dict[str, float]:
        videos = [self._shown(clip) for clip in (first, second)]
        pool = [*videos[0], *videos[1]]
        picks = [spread(len(video), self.first_frames) for video in videos]
        picks[1] = [len(videos[0]) + number for number in picks[1]]
        frames = {place: [pool[n - 1] for n in pick] for place, pick in zip(PLACES, picks, strict=True)}
        texts = {"prompt": first.prompt, "total": str(len(pool)), "second": str(len(videos[0]) + 1)}
        texts |= {"shown_1": _listed(picks[0]), "shown_2": _listed(picks[1]), "most": str(self.most)}
        messages = [Message("user", render(self.template, texts, frames))]
        for _ in range(self.turns):
            answer, text = await self.chat.ask(
                messages, lambda reply: (read_selection(reply, len(pool), self.most), reply.text), self.max_tokens
            )
            if isinstance(answer, dict):
                return answer
            messages += [Message("assistant", (text,)), Message("user", self._more(answer, pool, len(videos[0])))]
        raise CallFailed("no answer after all turns", f"{self.turns} turns")

    @staticmethod
    def _more(numbers: Sequence[int], pool: Sequence[Frame], split: int) -> tuple[str | Frame, ...]:
        parts: list[str | Frame] = []
        for number in numbers:
            parts += [f"Frame {number} (Video {1 if number <= split else 2}):", pool[number - 1]]
        return tuple(parts)


def spread(length: int, num: int) -> list[int]:
    """Numbers from 1 of `num` frames out of `length`, the last of each of `num` equal parts: 12 24 36 48 of 48."""
    num = min(num, length)
    return [round((part + 1) * length / num) for part in range(num)]


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


class VLMPairwise(WinRate):
    """The win rate of each clip in its group before a judge that sees two clips; scope "group".

    Every pair is judged in both orders (swap): a verdict that depends on the order is a tie, a failed call fails the
    comparison, and a clip without a comparison is invalid. G clips of a prompt cost G (G - 1) calls.

    Args:
        style: how the judge answers; see `answers` for the formats.
            "think": one winner (UnifiedReward-Think);
            "flex": a JSON object with a winner, and one for each of the leading categories (UnifiedReward-Flex).
                total = (w_o overall + w_d mean of the categories) / (w_o + w_d), in win rates, with w_o and w_d the
                weights "overall" and "categories";
            "select": the judge asks for the frames it wants to see (VR-Thinker); dims are TA, VQ and MQ.
        weights: for "flex", default {"overall": 1, "categories": 1}.
        categories: for "flex", what dims call the first categories, in the order of the answer.
        frames: frames of a clip that are shown, evenly spaced (8); for "select": that it may choose from (48).
        first_frames, turns, most: for "select": frames of each clip shown first, answers until the verdict, and
            frames in one request.
        swap: ask in both orders.
        template: file with the prompt: {prompt}, {video_1}, {video_2}, and for "select" {total}, {second}, {shown_1},
            {shown_2}, {most}; see `templates`. A published judge is asked with that of its authors.
        system: file with a system message.
        max_tokens: of the answer; one that is cut off is a failed call.
        cache: folder in which answers are kept.
        chat: model; with url, an OpenAI-compatible server: api_key_env, temperature, seed, concurrency, timeout,
            retries, backoff, image_format, extra (see `Endpoint`); else the model runs here: device, dtype.
    """

    def __init__(
        self,
        style: str = "think",
        *,
        weights: Mapping[str, float] | None = None,
        categories: Sequence[str] = ("alignment", "motion", "quality"),
        frames: int | None = None,
        first_frames: int = 4,
        turns: int = 6,
        most: int = 12,
        swap: bool = True,
        template: str | None = None,
        system: str | None = None,
        max_tokens: int = 4096,
        cache: str | None = None,
        name: str = "vlm_pairwise",
        **chat: Any,
    ):
        own = {"weights": weights, "categories": categories, "frames": frames, "first_frames": first_frames}
        own |= {"turns": turns, "most": most, "template": template, "system": system, "max_tokens": max_tokens}
        shared, text, system = self.check(style, **own, cache=cache, name=name, **chat)
        frames = frames or (48 if style == "select" else 8)
        self.chat = open_chat(name, cache, system, chat)
        if style == "select":
            judge = SelectingJudge(self.chat, text, frames, max_tokens, first_frames, turns, most)
        else:
            judge = PairJudge(self.chat, text, frames, max_tokens, categories if style == "flex" else ())
        super().__init__(judge, swap, name, shared)

    @staticmethod
    def check(
        style: str = "think",
        *,
        weights: Mapping[str, float] | None = None,
        categories: Sequence[str] = ("alignment", "motion", "quality"),
        frames: int | None = None,
        first_frames: int = 4,
        turns: int = 6,
        most: int = 12,
        swap: bool = True,
        template: str | None = None,
        system: str | None = None,
        max_tokens: int = 4096,
        cache: str | None = None,
        name: str = "vlm_pairwise",
        **chat: Any,
    ) -> tuple[dict[str, float], str, str | None]:
        """Validate the options without network and weights. Returns: weight of each dim, template, system message."""
        if style not in STYLES:
            raise RewardError(f"reward {name}: style {style!r} is not one of {', '.join(STYLES)}")
        shared = _weights(name, style, weights, categories)
        for option, value in (("first_frames", first_frames), ("turns", turns), ("most", most)):
            if not isinstance(value, int) or value < 1:
                raise RewardError(f"reward {name}: {option} is {value!r}, expected a positive whole number")
        text = load_template(name, template, f"pair_{style}.txt", PLACES)
        system = check_common(name, frames, max_tokens, cache, system)
        check_chat(name, chat)
        return shared, text, system

    async def score(self, clips: Sequence[Clip]) -> Scores:
        scores = await super().score(self.judge.prepared(clips))
        self.chat.report()
        return scores


def _weights(name: str, style: str, weights: Mapping[str, float] | None, categories: Sequence[str]) -> dict[str, float]:
    """Dimension -> its weight in the total."""
    if style != "flex":
        if weights is not None:
            raise RewardError(f"reward {name}: weights are for style flex; {style} has no categories")
        return {OVERALL: 1.0}
    given = {OVERALL: 1.0, "categories": 1.0} | dict(weights or {})
    good = all(isinstance(value, (int, float)) and 0 <= value < float("inf") for value in given.values())
    if given.keys() != {OVERALL, "categories"} or not good or not sum(given.values()):
        raise RewardError(f"reward {name}: weights are {given}, expected overall and categories, 0 or more, not both 0")
    if isinstance(categories, str) or not categories or len({*categories, OVERALL}) != len(categories) + 1:
        raise RewardError(f"reward {name}: categories are {categories!r}, expected different names")
    return {OVERALL: given[OVERALL]} | {category: given["categories"] / len(categories) for category in categories}
