"""From the answers of rewards to labelled pairs.

N videos of a record, S segments
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import NamedTuple

from ..data import Group, Pair, all_pairs, best_worst, combined, label_from_scores, pareto_pairs
from .answers import Answers
from .questions import Video, questions_of

BTT_BAND = math.log((5**2 - 2) / 5)  # a tie of data.btt_label at VideoReward's theta, 5
MEAN = "mean"


class Rule(NamedTuple):
    """How numbers become pairs and labels."""

    names: tuple[str, ...]  # of the rewards
    score: str = MEAN  # the column that decides, or MEAN: the mean of the rewards
    tie_eps: float = 0.0
    select: str = "best_worst"
    tolerance: float | None = None  # of select pareto
    emphasis: str | None = None

    @property
    def decider(self) -> str:
        """The name of the score that decides, and of the annotator."""
        return " + ".join(self.names) if self.score == MEAN else self.score

    def combined(self, scores: Mapping[str, float]) -> float:
        """The number that decides, of one video."""
        weights = dict.fromkeys(self.names, 1 / len(self.names)) if self.score == MEAN else self.score
        return combined(scores, weights)

    def label(self, a: float, b: float) -> int:
        return label_from_scores({self.decider: (a, b)}, None, self.tie_eps)


class Judged(NamedTuple):
    """What the rewards say of N videos of one prompt."""

    scores: dict[str, list[list[float]]]  # column -> video -> segment
    same: dict[tuple[int, int], list[bool]]  # two videos -> whether both orders gave one winner, by segment and reward


def judge(
    answers: Answers, videos: Sequence[Video], seconds: float | None = None, again: bool = False
) -> Judged | None:
    """Put together what was answered about N videos; None where an answer lacks.

    Of a reward that compares, a video's score is the mean over its opponents. Where the two orders of a comparison do
    not name the same winner it is a tie: both videos get the mean of all four numbers.
    """
    questions = questions_of(videos, answers.kinds, seconds, again)
    found = [(question.compares, numbers) for question in questions if (numbers := answers.numbers(question))]
    if len(found) < len(questions):
        return None
    alone = [numbers for compares, numbers in found if not compares]
    columns = [name for name in (alone[0] if alone else ()) if all(name in numbers for numbers in alone)]
    scores = {name: [[value for (value,) in numbers[name]] for numbers in alone] for name in columns}
    orders = iter([numbers for compares, numbers in found if compares])
    compared: dict[str, list[list[list[float]]]] = {}  # column -> video -> opponent -> segment
    same: dict[tuple[int, int], list[bool]] = {}
    for i, j in combinations(range(len(videos)), 2) if True in answers.kinds else ():
        there, back = next(orders), next(orders)
        for name in there:
            agreed = [_agreed(first, second[::-1]) for first, second in zip(there[name], back[name], strict=True)]
            table = compared.setdefault(name, [[] for _ in videos])
            table[i].append([a for a, _, _ in agreed])
            table[j].append([b for _, b, _ in agreed])
            if name in answers.names:
                same.setdefault((i, j), []).extend(agrees for _, _, agrees in agreed)
    for name, table in compared.items():
        scores[name] = [[fmean(values) for values in zip(*opponents, strict=True)] for opponents in table]
    return Judged(scores, same)


def pairs_from(
    record: Pair | Group,
    judged: Judged,
    rule: Rule,
    clip: tuple[int, float] | None = None,
    seconds: float | None = None,
) -> list[Pair]:
    """The labelled pairs of a record: itself, or those selected from a group.

    The label is that of the score that decides. With segments each has its label, and the pair that of their votes,
    ties left out: what decides then is the share of the segments that a video won, a score of its own.

    Args:
        clip: frames and rate of the videos, where they are cut into segments of `seconds`.
    """
    means = {column: tuple(map(fmean, videos)) for column, videos in judged.scores.items()}
    scored = record._replace(scores=means | {rule.decider: tuple(map(fmean, deciding(judged, rule)))})
    found = []
    for pair in _select(scored, rule, seconds) if isinstance(scored, Group) else [scored]:
        i, j = (record.members.index(member) for member in (pair.a, pair.b))
        pair = pair._replace(
            label=rule.label(*pair.scores[rule.decider]),
            labels={column: rule.label(*pair.scores[column]) for column in means},
            annotator=rule.decider,
            order_consistent=all(judged.same[min(i, j), max(i, j)]) if judged.same else None,
        )
        found.append(pair if seconds is None else _by_segments(pair, (i, j), judged, rule, clip, seconds))
    return found


def _select(group: Group, rule: Rule, seconds: float | None) -> list[Pair]:
    if rule.select == "pareto":
        same_kind = [name for name in group.scores if ("/" in name) == ("/" in rule.score)]
        dims = dict.fromkeys([*same_kind, *filter(None, [rule.emphasis])])
        return pareto_pairs(group, list(dims), rule.score, rule.tolerance, rule.emphasis)
    # The votes of segments may decide where their means are close.
    tie_eps = rule.tie_eps if seconds is None else 0.0
    return {"best_worst": best_worst, "all": all_pairs}[rule.select](group, rule.decider, tie_eps)


def _by_segments(
    pair: Pair, places: tuple[int, int], judged: Judged, rule: Rule, clip: tuple[int, float], seconds: float
) -> Pair:
    numbers = deciding(judged, rule)
    votes = [rule.label(a, b) for a, b in zip(*(numbers[place] for place in places), strict=True)]
    annotator = f"{rule.decider} by segments"
    return pair._replace(
        label=_sign(sum(votes)),
        scores=pair.scores | {annotator: (votes.count(1) / len(votes), votes.count(-1) / len(votes))},
        annotator=annotator,
        frames=clip[0],
        fps=clip[1],
        segment_seconds=seconds,
        segment_labels=tuple(votes),
    )


def deciding(judged: Judged, rule: Rule) -> list[list[float]]:
    """The number that decides, by video and segment."""
    found = []
    for place in range(len(next(iter(judged.scores.values())))):
        by_segment = zip(*(videos[place] for videos in judged.scores.values()), strict=True)
        found.append([rule.combined(dict(zip(judged.scores, values, strict=True))) for values in by_segment])
    return found


def _agreed(there: Sequence[float], back: Sequence[float]) -> tuple[float, float, bool]:
    """Numbers of two videos out of two orders, and whether these name the same winner."""
    if _sign(there[0] - there[1]) == _sign(back[0] - back[1]):
        return (there[0] + back[0]) / 2, (there[1] + back[1]) / 2, True
    return fmean([*there, *back]), fmean([*there, *back]), False


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
