"""Win rate: a reward of scope "group", made of a judge that compares two clips.

N clips; a pair (i, j) holds the indices of two of them
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rewards.contract import Clip, Reward, RewardError, Scores, is_reward, lift

OVERALL = "overall"  # the dimension that makes the total
Judge = Callable[[Clip, Clip], Any]  # -> a number, numbers by dimension, or None; or an awaitable of one of these
Verdict = dict[str, float]  # dimension -> how surely the first clip is better, 0 to 1; empty: the comparison failed
Pair = tuple[int, int]


def win_rate(judge: Judge | Reward, swap: bool = True, name: str = "win_rate") -> Reward:
    """Score each clip by how it does against the others of its group; scope "group".

    All pairs of a group are judged, at the same time where the judge is a coroutine function. `total` is the mean over
    opponents of 1 (won), 0.5 (tie) and 0 (lost), over the comparisons that succeeded: a clip with none is invalid.
    `dims` hold the same for each dimension of the judge.

    Args:
        judge: called with two clips, returns how surely the first one is better, 0 to 1, or such numbers by dimension,
            of which "overall" makes the total; None or NaN is a failed comparison. An object may have `indices` as a
            reward has, and name its dimensions in `dims`. Or a reward, whose totals (and dims) are compared: the
            higher one wins, equal ones tie.
        swap: ask in both orders. If the two disagree about the winner it is a tie, else their mean counts; if one
            fails, the comparison does. A reward knows no order, so that it is not asked twice.
    Raises: RewardError when called with a group of one clip or of several prompts, and for an impossible verdict.
    """
    if is_reward(judge):
        return RankedReward(lift(judge), name)
    return WinRate(judge, swap, name)


class WinRate(Reward):
    """See `win_rate`.

    Args:
        weights: dimension -> weight; total is the weighted mean of their rates. Default: that of "overall".
    """

    scope = "group"

    def __init__(
        self, judge: Judge, swap: bool = True, name: str = "win_rate", weights: Mapping[str, float] | None = None
    ):
        self.judge, self.swap, self.name = judge, swap, name
        self.weights = dict(weights or {OVERALL: 1.0})

    def indices(self, length: int, fps: float) -> list[int]:
        return self.judge.indices(length, fps) if hasattr(self.judge, "indices") else super().indices(length, fps)

    async def score(self, clips: Sequence[Clip]) -> Scores:
        pairs = pairs_of_groups(clips, self.name)
        verdicts = await asyncio.gather(*(self._compare(clips[i], clips[j]) for i, j in pairs))
        rates = mean_wins(
            len(clips), dict(zip(pairs, verdicts, strict=True)), getattr(self.judge, "dims", self.weights)
        )
        total = sum(weight * rates[dim] for dim, weight in self.weights.items()) / sum(self.weights.values())
        return _scores(total, rates if len(rates) > 1 else {}, clips)

    async def _compare(self, first: Clip, second: Clip) -> Verdict:
        orders = [(first, second), (second, first)] if self.swap else [(first, second)]
        there, *back = await asyncio.gather(*(self._ask(*order) for order in orders))
        return {dim: agreed(there[dim], 1 - back[0][dim]) for dim in there if dim in back[0]} if back else there

    async def _ask(self, first: Clip, second: Clip) -> Verdict:
        answer = self.judge(first, second)
        answer = await answer if inspect.isawaitable(answer) else answer
        if answer is None:
            return {}
        try:
            named = answer if isinstance(answer, Mapping) else {OVERALL: answer}
            verdict = {str(dim): float(value) for dim, value in named.items()}
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward {self.name}: the judge returned {answer!r}, expected numbers or None") from error
        if any(value != value for value in verdict.values()):  # NaN
            return {}
        missing = self.weights.keys() - verdict.keys()
        if missing or not all(0 <= value <= 1 for value in verdict.values()):
            wrong = f"without {', '.join(sorted(missing))}" if missing else "outside 0 to 1"
            raise RewardError(f"reward {self.name}: the judge returned {answer!r}, {wrong}")
        return verdict


class RankedReward(Reward):
    """A reward's totals and dims turned into win rates; see `win_rate`."""

    scope = "group"

    def __init__(self, reward: Reward, name: str):
        self.reward, self.name = reward, name

    @property
    def is_async(self) -> bool:
        return self.reward.is_async

    def indices(self, length: int, fps: float) -> list[int]:
        return self.reward.indices(length, fps)

    def score(self, clips: Sequence[Clip]) -> Scores | Awaitable[Scores]:
        pairs = pairs_of_groups(clips, self.name)
        return self._awaited(clips, pairs) if self.is_async else self._ranked(self.reward(clips), clips, pairs)

    async def _awaited(self, clips: Sequence[Clip], pairs: list[Pair]) -> Scores:
        return self._ranked(self.reward._checked(await self.reward._started(clips), len(clips)), clips, pairs)

    def _ranked(self, scores: Scores, clips: Sequence[Clip], pairs: list[Pair]) -> Scores:
        values = {dim: column.tolist() for dim, column in {**scores.dims, OVERALL: scores.total}.items()}
        valid = scores.valid.tolist()
        verdicts = {
            (i, j): {dim: _higher(v[i], v[j]) for dim, v in values.items()} if valid[i] and valid[j] else {}
            for i, j in pairs
        }
        rates = mean_wins(len(clips), verdicts, values)
        return _scores(rates.pop(OVERALL), rates, clips)


def pairs_of_groups(clips: Sequence[Clip], name: str) -> list[Pair]:
    """All pairs of clips that share a group. Raises: RewardError for a group of one clip or of several prompts."""
    members: dict[int, list[int]] = {}
    for index, clip in enumerate(clips):
        members.setdefault(clip.group, []).append(index)
    for group, indices in members.items():
        prompts = {clips[index].prompt for index in indices}
        if len(indices) < 2:
            raise RewardError(
                f"reward {name}: group {group} ({clips[indices[0]].prompt[:80]!r}) has one clip, and nothing to win "
                "against; make two or more a prompt"
            )
        if len(prompts) > 1:
            raise RewardError(
                f"reward {name}: group {group} holds clips of {len(prompts)} prompts; give each prompt its own number "
                "(Clip(..., group=...))"
            )
    return [pair for indices in members.values() for pair in itertools.combinations(indices, 2)]


def mean_wins(num: int, verdicts: Mapping[Pair, Verdict], dims: Iterable[str]) -> dict[str, Tensor]:
    """Dimension -> (num,) mean verdict over the comparisons of each clip; NaN where it has none."""
    names = dict.fromkeys([*dims, *(dim for verdict in verdicts.values() for dim in verdict)])
    rates = {}
    for dim in names:
        won, played = torch.zeros(num, dtype=torch.float64), torch.zeros(num, dtype=torch.float64)
        for (i, j), verdict in verdicts.items():
            if dim in verdict:
                won[i] += verdict[dim]
                won[j] += 1 - verdict[dim]
                played[[i, j]] += 1
        rates[dim] = (won / played).float()
    return rates


def agreed(there: float, back: float) -> float:
    """One verdict out of two on the same first clip: their mean where they name the same winner, else a tie."""
    return (there + back) / 2 if (there - 0.5) * (back - 0.5) > 0 else 0.5


def _higher(first: float, second: float) -> float:
    return 0.5 if first == second else float(first > second)


def _scores(total: Tensor, rates: Mapping[str, Tensor], clips: Sequence[Clip]) -> Scores:
    device = clips[0].video.device
    return Scores(total.to(device), {dim: rate.to(device) for dim, rate in rates.items()})
