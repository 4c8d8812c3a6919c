"""Preferences: pairs and groups of videos with what a reward or people said of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from .prompts import Prompt

Score = str | Mapping[str, float] | None  # a dimension, the weights of a sum, or None: the mean of all dimensions


class Member(NamedTuple):
    """One video, its encoded form, or both."""

    video: Path | None  # mp4 and others that rewards.video_files reads; or an image, a video of one frame
    latent: Path | None  # .safetensors with the tensor "state" (and "noise", what it was generated from)
    seed: int | None = None


class Pair(NamedTuple):
    """Two videos of one prompt. Labels are 1 where a is better, -1 where b is, 0 for a tie."""

    id: str
    prompt: Prompt
    a: Member
    b: Member
    label: int | None  # None: not labelled
    scores: dict[str, tuple[float, float]]  # dimension -> of a, of b
    labels: dict[str, int]  # dimension -> label
    fps: float | None = None
    frames: int | None = None
    segment_seconds: float | None = None
    segment_labels: tuple[int, ...] | None = None
    eta: float | None = None  # share of noise that both were made from, of one clip: 0 to 1
    source: str | None = None
    annotator: str | None = None  # who labelled it; if a score has this name, the label follows it
    order_consistent: bool | None = None  # whether the judge said the same with a and b exchanged
    line: int = 0  # of the file

    @property
    def members(self) -> tuple[Member, Member]:
        return self.a, self.b


class Group(NamedTuple):
    """Videos of one prompt, at least one."""

    id: str
    prompt: Prompt
    members: tuple[Member, ...]
    scores: dict[str, tuple[float | None, ...]]  # dimension -> of each member, None: not scored
    source: str | None = None
    line: int = 0  # of the file


def combined(scores: Mapping[str, float | None], score: Score = None) -> float:
    """One number for the scores of one video: a dimension, a weighted sum, or the mean of all; NaN where one lacks."""
    if isinstance(score, str):
        score = {score: 1.0}
    values = [scores.get(name) for name in (scores if score is None else score)]
    if not values or None in values:
        return math.nan
    numbers = [float(value) for value in values]  # never text, by which "10" comes before "9"
    if score is None:
        return math.fsum(numbers) / len(numbers)
    return math.fsum(weight * number for weight, number in zip(score.values(), numbers, strict=True))


def combined_each(scores: Mapping[str, Sequence[float | None]], score: Score = None) -> list[float]:
    """`combined` of every video, where scores hold those of several by dimension; none where there is no dimension."""
    return [combined(dict(zip(scores, row, strict=True)), score) for row in zip(*scores.values(), strict=True)]


def deciding(pair: Pair) -> Score:
    """What a pair's label follows: the score that its annotator is named after, if there is one, or the mean of all."""
    return pair.annotator if pair.annotator in pair.scores else None


def score_of(pair: Pair, score: Score = None) -> tuple[float, float] | None:
    """`combined` of a and of b; None where a score that this takes lacks.

    Where an annotator bears the name of one of the scores, it is that one which None means: the label follows it.
    """
    found = combined_each(pair.scores, pair.annotator if score is None and pair.annotator in pair.scores else score)
    return (found[0], found[1]) if found and all(map(math.isfinite, found)) else None


def judged_by_people(annotator: str | None) -> bool:
    """Whether labels need not follow the scores: nobody is named as annotator, or a name that begins with "human"."""
    return annotator is None or annotator.lower().startswith("human")
