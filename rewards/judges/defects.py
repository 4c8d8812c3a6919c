"""Defects that a judge finds in a clip, each with its place and time (`vlm_defects`).

F frames, S segments, N clips
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch

from rewards.contract import Clip, Reward, RewardError, Scores
from rewards.frames import frame_indices
from rewards.judges.answers import answer_start
from rewards.judges.backends import check_chat, open_chat
from rewards.judges.chat import CallFailed, Message, Reply
from rewards.judges.pointwise import check_common, shown
from rewards.judges.templates import load_template, render

MOST = 64  # defects in an answer
SLACK = 0.1  # seconds by which an answer may overshoot the end of a clip, for judges that round
Box = tuple[float, float, float, float]
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


class Defect(NamedTuple):
    """One defect."""

    kind: str
    description: str
    start: float  # from 0, the beginning of the clip, to 1, its end
    end: float
    box: Box  # left, top, right, bottom, from 0 to 1


class Layout(NamedTuple):
    """How an answer counts time and place."""

    time: Literal["frames", "seconds"]
    length: float  # frames shown, or seconds of the clip
    width: float  # the number that stands for the right edge
    height: float


def read_defects(reply: Reply, layout: Layout) -> list[Defect]:
    """The defects of an answer {"defects": [{"kind", "description", "frames" or "seconds", "box"}, ...]}.

    Frames are counted from 1, and both ends belong to the span; seconds are counted from the beginning of the clip.
    Everything up to a closing </think> is thought, and what stands around the object is not looked at.

    Raises: CallFailed for any other answer: keys that are missing or unknown, a span or a box that is empty or not in
        the clip, more than 64 defects.
    """
    if not reply.finished:
        raise CallFailed("answer cut off", "raise max_tokens")
    text = reply.text[answer_start(reply.text) :]
    try:
        answer = json.loads(text[text.index("{") : text.rindex("}") + 1])
        found = [_defect(defect, layout) for defect in answer["defects"]]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CallFailed("answer is not the JSON expected", f"{error} in {text[-150:]!r}") from error
    if len(found) > MOST or len(answer) > 1 or not isinstance(answer["defects"], list):
        raise CallFailed("answer is not the JSON expected", f"{len(found)} defects, keys {list(answer)}")
    return found


def _defect(given: dict[str, Any], layout: Layout) -> Defect:
    if given.keys() != {"kind", "description", layout.time, "box"}:
        raise ValueError(f"a defect with {', '.join(given)}")
    kind, description = given["kind"], given["description"]
    if not (isinstance(kind, str) and isinstance(description, str) and kind.strip()):
        raise ValueError("a defect without a kind")
    (start, end), (left, top, right, bottom) = given[layout.time], given["box"]
    numbers = start, end, left, top, right, bottom
    if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
        raise ValueError(f"{numbers} are not numbers")
    if layout.time == "frames":
        if not (isinstance(start, int) and isinstance(end, int)):
            raise ValueError(f"frames {start} to {end}")
        start -= 1
    else:
        end = min(end, layout.length) if end <= layout.length + SLACK else end
    if not 0 <= start < end <= layout.length:
        raise ValueError(f"{layout.time} {given[layout.time]} of {layout.length:g}")
    if not (0 <= left < right <= layout.width and 0 <= top < bottom <= layout.height):
        raise ValueError(f"box {given['box']} of {layout.width:g} x {layout.height:g}")
    box = left / layout.width, top / layout.height, right / layout.width, bottom / layout.height
    return Defect(kind.strip(), description.strip(), start / layout.length, end / layout.length, box)


def defective(defects: Sequence[Defect], start: float, end: float) -> float:
    """The share of a stretch of time, times area, that lies within a defect; where several overlap it counts once."""
    times = sorted({start, end, *(t for d in defects for t in (d.start, d.end) if start < t < end)})
    volume = sum(
        (after - before) * union_area([d.box for d in defects if d.start <= before and after <= d.end])
        for before, after in pairwise(times)
    )
    return volume / (end - start)


def clean_shares(defects: Sequence[Defect], segments: int) -> list[float]:
    """For each of S equal segments of a clip, the share of it, time by area, that lies within no defect."""
    limits = pairwise(segment / segments for segment in range(segments + 1))
    return [max(0.0, 1 - defective(defects, *limit)) for limit in limits]


def union_area(boxes: Sequence[Box]) -> float:
    """The area that boxes cover together."""
    edges = sorted({edge for left, _, right, _ in boxes for edge in (left, right)})
    area = 0.0
    for left, right in pairwise(edges):
        covered = 0.0  # everything above is counted
        for top, bottom in sorted((box[1], box[3]) for box in boxes if box[0] <= left and right <= box[2]):
            area += (right - left) * max(0.0, bottom - max(top, covered))
            covered = max(covered, bottom)
    return area


class VLMDefects(Reward):
    """1 less the share of a clip, time by area, that a judge calls defective; 1 where it finds nothing, 0 at worst.

    `dense` (N, S) is the same for each of the S equal segments that the shown frames stand for (None where clips differ
    in S), `total` its mean. `dims`: time, the share of the clip's time without any defect; defects, their number.

    The idea, a judge that explains what gives a video away and says where and when, is that of DeeptraceReward (arXiv
    2509.22646); the rule that makes it one number is our own. Models find places badly and times worse, says that
    paper: look at what yours finds (`find`) before training on it. A small box costs little; where every defect should
    count alike, `aspects(reward, {"clean": ["time"]})` counts time alone. How that paper's own model
    (DeeptraceReward/RewardModel) is asked and answers is not known here, so that it cannot be used as it is.

    Args:
        time: how the answer counts it: "frames" shown, from 1, or "seconds".
        box: the number that stands for the right and lower edges in boxes: 1000, 1; or "pixels" of the clip.
        frames: frames shown, evenly spaced from first to last; None: all.
        template: file with the prompt: {prompt}, {video}, and if wanted {count} (of frames shown), and {seconds},
            {width} and {height} (in pixels) of the clip; see `templates`. Needed where time or box are given.
        system: file with a system message.
        max_tokens: of the answer; one that is cut off is a failed call.
        cache: folder in which answers are kept.
        chat: model; with url, an OpenAI-compatible server: api_key_env, temperature, seed, concurrency, timeout,
            retries, backoff, image_format, extra (see `Endpoint`); else the model runs here: device, dtype.
    """

    def __init__(
        self,
        *,
        time: Literal["frames", "seconds"] = "frames",
        box: float | Literal["pixels"] = 1000,
        frames: int | None = 8,
        template: str | None = None,
        system: str | None = None,
        max_tokens: int = 2048,
        cache: str | None = None,
        name: str = "vlm_defects",
        **chat: Any,
    ):
        own = {"time": time, "box": box, "frames": frames, "template": template, "max_tokens": max_tokens}
        self.template, system = self.check(**own, system=system, cache=cache, name=name, **chat)
        self.name, self.time, self.box = name, time, box
        self.frames, self.max_tokens = frames, max_tokens
        self.chat = open_chat(name, cache, system, chat)

    @staticmethod
    def check(
        *,
        time: str = "frames",
        box: float | str = 1000,
        frames: int | None = 8,
        template: str | None = None,
        system: str | None = None,
        max_tokens: int = 2048,
        cache: str | None = None,
        name: str = "vlm_defects",
        **chat: Any,
    ) -> tuple[str, str | None]:
        """Validate the options without network and weights. Returns: template, system message."""
        if time not in ("frames", "seconds"):
            raise RewardError(f"reward {name}: time is {time!r}, expected frames or seconds")
        if box != "pixels" and not (isinstance(box, (int, float)) and 0 < box < math.inf):
            raise RewardError(f"reward {name}: box is {box!r}, expected a number above 0, or pixels")
        if template is None and (time != "frames" or box != 1000):
            raise RewardError(f"reward {name}: time and box need a template of yours that asks for such answers")
        text = load_template(name, template, "defects.txt", ("video",))
        system = check_common(name, frames, max_tokens, cache, system)
        check_chat(name, chat)
        return text, system

    def indices(self, length: int, fps: float) -> list[int]:
        return frame_indices(length, self.frames)

    async def score(self, clips: Sequence[Clip]) -> Scores:
        found = await self.find(clips)
        counts = [len(self.indices(len(clip.video), clip.fps)) for clip in clips]
        rows, dims = [], {"time": [], "defects": []}
        for defects, count in zip(found, counts, strict=True):
            failed = defects is None
            rows.append([math.nan] * count if failed else clean_shares(defects, count))
            everywhere = [] if failed else [defect._replace(box=WHOLE) for defect in defects]
            dims["time"].append(math.nan if failed else clean_shares(everywhere, 1)[0])
            dims["defects"].append(math.nan if failed else float(len(defects)))
        device = clips[0].video.device
        return Scores(
            torch.tensor([sum(row) / len(row) for row in rows], device=device),
            {name: torch.tensor(values, device=device) for name, values in dims.items()},
            torch.tensor(rows, device=device) if len(set(counts)) == 1 else None,
        )

    async def find(self, clips: Sequence[Clip]) -> list[list[Defect] | None]:
        """The defects of each clip, to read or to draw; None where the call failed."""
        found = await asyncio.gather(*(self.chat.attempt(self._judge(clip)) for clip in clips))
        self.chat.report()
        return found

    async def _judge(self, clip: Clip) -> list[Defect]:
        frames = shown(clip, self.frames)
        seconds, (height, width) = len(clip.video) / clip.fps, clip.video.shape[-2:]
        texts = {"prompt": clip.prompt, "count": str(len(frames)), "seconds": f"{seconds:.2f}"}
        parts = render(self.template, texts | {"width": str(width), "height": str(height)}, {"video": frames})
        length = len(frames) if self.time == "frames" else seconds
        edges = (width, height) if self.box == "pixels" else (self.box, self.box)
        layout = Layout(self.time, length, *edges)
        return await self.chat.ask([Message("user", parts)], lambda r: read_defects(r, layout), self.max_tokens)
