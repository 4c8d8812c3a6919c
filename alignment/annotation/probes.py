"""Two probes of what labels: whether it likes still videos, and whether its labels negate when a pair is exchanged.

Judges may like a video better that does not move: VisionReward preferred a clip of which one frame was repeated to the
clip itself in about 70 of 100 cases, VideoReward in about 20 (DenseDPO, arXiv 2506.03517). What is trained on such
labels learns to stand still.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any, TypeVar

from rewards.video_files import IMAGE_SUFFIXES

from ..data import Pair, exchanged
from .answers import Answers
from .labels import Judged, Rule, deciding, judge
from .questions import Video, questions_of, videos_of

COUNT = 16  # videos, and pairs
T = TypeVar("T")


def static_duplicate(answers: Answers, videos: Sequence[Video], rule: Rule) -> dict[str, Any] | None:
    """Some videos against themselves frozen at the first frame.

    Returns: how many were judged, and the share of these in which the frozen one wins or ties, by the score that
        decides and by every reward; None where none was.
    """
    moving = [video for video in videos if video.path.suffix.lower() not in IMAGE_SUFFIXES]
    pairs = [[video, video._replace(frozen=True)] for video in _spread(moving)]
    answers.ask([question for both in pairs for question in questions_of(both, answers.kinds)])
    judged = [found for both in pairs if (found := judge(answers, both))]
    if not judged:
        return None
    names = [name for name in (rule.score, *rule.names) if name in judged[0].scores]
    shares = {name: _still(judged, rule._replace(score=name)) for name in dict.fromkeys(names)}
    return {"videos": len(judged), "share": _still(judged, rule), "by_score": shares}


def label_swap(
    answers: Answers, pairs: Sequence[Pair], rule: Rule, seconds: float | None = None
) -> dict[str, Any] | None:
    """Some pairs asked about again with a and b exchanged, the last pair first, so that other videos share a call.

    Returns: how many were judged, and the share of these whose labels, those of segments too, negate; None where none
        was.
    """
    chosen = _spread(pairs)[::-1]
    answers.ask([q for pair in chosen for q in questions_of(videos_of(exchanged(pair)), answers.kinds, seconds, True)])
    negated = []
    for pair in chosen:
        there = judge(answers, videos_of(pair), seconds)
        back = judge(answers, videos_of(exchanged(pair)), seconds, again=True)
        if there and back:
            negated.append(_labels(there, rule) == [-label for label in _labels(back, rule)])
    return {"pairs": len(negated), "share": fmean(negated)} if negated else None


def _labels(judged: Judged, rule: Rule) -> list[int]:
    """Of each segment."""
    return [rule.label(a, b) for a, b in zip(*deciding(judged, rule), strict=True)]


def _still(judged: Sequence[Judged], rule: Rule) -> float:
    """The share in which the second video is as good as the first, or better."""
    return fmean(_labels(found, rule) != [1] for found in judged)


def _spread(items: Sequence[T]) -> list[T]:
    """At most COUNT of the items, evenly spaced."""
    count = min(COUNT, len(items))
    return [items[i * len(items) // count] for i in range(count)]
