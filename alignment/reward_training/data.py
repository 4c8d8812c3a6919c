"""Preferences as a reward model learns from them: which clips are compared, and what is known of each.

K dimensions
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from rewards import RewardError

from ..data import Group, Member, Pair, label_from_scores
from ..errors import Problems, UserError

OVERALL = "Overall"  # the dimension that a pair's own label is of


class Example(NamedTuple):
    """One pair or group. What is not known is NaN."""

    record: Pair | Group
    compared: tuple[tuple[int, int], ...]  # places of two members
    labels: tuple[tuple[float, ...], ...]  # of each comparison: K of 1, -1, 0
    scores: tuple[tuple[float, ...], ...]  # of each member: K

    @property
    def members(self) -> Sequence[Member]:
        return self.record.members

    @property
    def fps(self) -> float | None:
        """The rate to believe instead of the files'."""
        return self.record.fps if isinstance(self.record, Pair) else None


class Clips(NamedTuple):
    """The clips of some examples, in a row."""

    first: Tensor  # (C,) of each comparison
    second: Tensor  # (C,)
    labels: Tensor  # (C, K)
    scores: Tensor  # (N, K)


def examples_of(records: Sequence[Pair | Group], dimensions: Sequence[str], tie_eps: float = 0.0) -> list[Example]:
    """Records with a label or a score in one dimension at least.

    A pair's label of a dimension counts before its scores (its own label is that of `OVERALL`); of a group every two
    members are compared by their scores.

    Args: tie_eps: scores that are no further apart are a tie.
    """
    found = []
    for record in records:
        scores = tuple(
            tuple(_number(record.scores.get(name, ()), place) for name in dimensions)
            for place in range(len(record.members))
        )
        compared = tuple(combinations(range(len(record.members)), 2))
        if isinstance(record, Pair):
            labels = (tuple(_label(record, name, tie_eps) for name in dimensions),)
        else:
            labels = tuple(
                tuple(_compare(a, b, tie_eps) for a, b in zip(scores[i], scores[j], strict=True)) for i, j in compared
            )
        if any(math.isfinite(value) for row in (*labels, *scores) for value in row):
            found.append(Example(record, compared, labels, scores))
    return found


def check_examples(
    examples: Sequence[Example], dimensions: Sequence[str], place: str, scores: bool, ties: bool = True
) -> None:
    """Every dimension has something to learn from, and every clip is a video.

    Args:
        scores: whether it is scores that are learned from, or comparisons.
        ties: whether a tie is something to learn from.
    Raises: UserError, or Problems with a line for each clip.
    """
    for column, name in enumerate(dimensions):
        cells = [row[column] for example in examples for row in (example.scores if scores else example.labels)]
        if not any(math.isfinite(cell) and (scores or ties or cell != 0) for cell in cells):
            what = "score" if scores else "label" if ties else "label but ties"
            there = {name for e in examples for name in (*e.record.scores, *getattr(e.record, "labels", ()))}
            raise UserError(
                f"{place}: no {what} of {name}; set algorithm.dimensions to what is labelled"
                f"{': ' + ', '.join(sorted(there)) if there else ''}"
            )
    problems = [
        f"{place} line {example.record.line}: a member has a latent alone; a reward model looks at videos"
        for example in examples
        if any(member.video is None for member in example.members)
    ]
    if problems:
        raise Problems(problems)


def check_prompts(records: Sequence[Pair | Group], check: Callable[[str], None], place: str) -> None:
    """Raises: Problems, one line for each prompt that `check` refuses by a RewardError."""
    problems = []
    for record in records:
        try:
            check(record.prompt.text)
        except RewardError as error:
            problems.append(f"{place} line {record.line}: {error}")
    if problems:
        raise Problems(problems)


def videos_of(examples: Sequence[Example]) -> Iterator[tuple[Path, float | None]]:
    """The files of all members, each with the rate to believe instead of the file's."""
    return ((member.video, example.fps) for example in examples for member in example.members)


def in_a_row(examples: Sequence[Example], num_dimensions: int) -> Clips:
    """Number the clips of some examples through."""
    first, second, start = [], [], 0
    for example in examples:
        first += [start + i for i, _ in example.compared]
        second += [start + j for _, j in example.compared]
        start += len(example.members)
    labels = [row for example in examples for row in example.labels]
    scores = [row for example in examples for row in example.scores]
    return Clips(
        torch.tensor(first, dtype=torch.long),
        torch.tensor(second, dtype=torch.long),
        torch.tensor(labels).view(-1, num_dimensions),
        torch.tensor(scores).view(-1, num_dimensions),
    )


def _number(values: Sequence[float | None], place: int) -> float:
    value = values[place] if place < len(values) else None
    return math.nan if value is None else value


def _label(pair: Pair, dimension: str, tie_eps: float) -> float:
    given = pair.labels.get(dimension)
    if given is None and dimension == OVERALL:
        given = pair.label
    if given is None and dimension in pair.scores:
        given = label_from_scores(pair.scores, dimension, tie_eps)
    return math.nan if given is None else float(given)


def _compare(a: float, b: float, tie_eps: float) -> float:
    return math.nan if math.isnan(a - b) else 0.0 if abs(a - b) <= tie_eps else math.copysign(1.0, a - b)
