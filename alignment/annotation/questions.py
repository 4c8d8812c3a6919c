"""What rewards are asked: about one video, or, where they compare, about two in an order.

S segments of a video; one, the whole video, where it is not cut
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from rewards.contract import Clip, Reward
from rewards.scoring.asking import Row, ask
from rewards.video_files import read_video

from ..data import Group, Pair, Prompt, segment_bounds

Numbers = dict[str, list[list[float]]]  # column (a reward, or reward/dimension) -> segment -> video of the question
Read = dict[tuple[Path, float | None], tuple[Tensor, float]]  # file and rate to believe -> frames as bytes, and rate


class Video(NamedTuple):
    """A video and what it was made for."""

    path: Path
    prompt: Prompt
    fps: float | None = None  # the rate to believe; None: the file's
    frozen: bool = False  # every frame is the first one


class Question(NamedTuple):
    videos: tuple[Video, ...]  # one for the rewards that score a video, two for those that compare
    seconds: float | None = None  # of a segment; None: the whole video
    again: bool = False  # asked a second time

    @property
    def compares(self) -> bool:
        return len(self.videos) == 2

    def __str__(self) -> str:
        return " or ".join(f"{video.path.name}{' frozen' * video.frozen}" for video in self.videos)

    def key(self, folder: Path) -> str:
        """The same for the same question about the same files, which are named from the folder."""
        videos = [
            [os.path.relpath(path, folder), path.stat().st_size, prompt.text, prompt.meta, fps, frozen]
            for path, prompt, fps, frozen in self.videos
        ]
        asked = json.dumps([videos, self.seconds, self.again], sort_keys=True, default=str)
        return hashlib.sha256(asked.encode()).hexdigest()[:20]


class Answer(NamedTuple):
    numbers: Numbers
    error: str | None = None  # why a number lacks


def videos_of(record: Pair | Group) -> list[Video]:
    fps = record.fps if isinstance(record, Pair) else None
    return [Video(member.video, record.prompt, fps) for member in record.members]


def questions_of(
    videos: Sequence[Video], kinds: set[bool], seconds: float | None = None, again: bool = False
) -> list[Question]:
    """All about videos of one prompt: each of them, and every two in both orders.

    Args:
        kinds: whether there are rewards that score a video (False) and such that compare (True).
    """
    found = [(video,) for video in videos] if False in kinds else []
    if True in kinds:
        found += [order for a, b in combinations(videos, 2) for order in ((a, b), (b, a))]
    return [Question(each, seconds, again) for each in found]


def read_clips(question: Question, read: Read) -> list[list[Clip]]:
    """By segment, the clip of each video, still as bytes. What was read of a file is kept in `read`.

    Raises: RewardError for a file that cannot be read.
    """
    whole = []
    for path, prompt, fps, frozen in question.videos:
        if (path, fps) not in read:
            read[path, fps] = read_video(path, fps)
        frames, rate = read[path, fps]
        whole.append(Clip(frames[:1].expand_as(frames) if frozen else frames, prompt.text, rate, meta=prompt.meta))
    if question.seconds is None:
        return [whole]
    bounds = segment_bounds(len(whole[0].video), whole[0].fps, question.seconds)
    return [[replace(clip, video=clip.video[start:stop]) for clip in whole] for start, stop in bounds]


def answers_of(rewards: Mapping[str, Reward], asked: Sequence[list[list[Clip]]]) -> list[Answer]:
    """Answer several questions of one kind in one call; rewards that compare are asked one by one where that fails.

    Args:
        asked: of each question its clips, by segment and video. Those of a segment are one group to a reward.
    Raises: rewards.scoring.asking.RewardFailed for a fault in a reward.
    """
    groups = [segment for segments in asked for segment in segments]
    rows = ask(rewards, [replace(clip, group=i) for i, group in enumerate(groups) for clip in group])
    if len(asked) > 1 and len(groups[0]) == 2 and any(row["error"] for row in rows):
        return [answer for segments in asked for answer in answers_of(rewards, [segments])]
    left = iter(rows)
    return [_answer(list(rewards), [[next(left) for _ in segment] for segment in segments]) for segments in asked]


def _answer(names: Sequence[str], rows: list[list[Row]]) -> Answer:
    every = [row for segment in rows for row in segment]
    if errors := [row["error"] for row in every if row["error"]]:
        return Answer({}, errors[0])
    columns = [name for name in every[0] if name != "error" and not name.endswith(":valid")]
    for name in columns:
        if any(row.get(name) is None for row in every):
            return Answer({}, f"{name} has no number (NaN, or a call that failed)")
    if failed := [name for name in names if not all(row[f"{name}:valid"] for row in every)]:
        return Answer({}, f"{failed[0]} is not valid")
    return Answer({name: [[row[name] for row in segment] for segment in rows] for name in columns})
