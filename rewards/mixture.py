"""Criteria into aspects, aspects into one score: a mixture, gated by a model or with fixed weights.

from rewards import aspects, load
judge = load("vlm_score", url="http://127.0.0.1:8000/v1", model="judge")             # dims alignment, physics, style
reward = aspects(judge, {"text": ["alignment"], "picture": {"physics": 2, "style": 1}}, {"text": 1, "picture": 3})

N clips, C criteria, A aspects
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rewards.contract import Clip, Reward, RewardError, Scores, lift

Groups = Mapping[str, Sequence[str] | Mapping[str, float]]


class Mixture(NamedTuple):
    """What a mixture gives."""

    aspects: Tensor  # (N, A)
    total: Tensor  # (N,)


def mixture(
    criteria: Tensor,
    criterion_gates: Tensor,
    aspect_gates: Tensor,
    groups: Sequence[Sequence[int]],
    temperature: float = 1.0,
) -> Mixture:
    """Gated means: s_a = sum_c softmax_c(g_c / t) r_c over the criteria of aspect a; sum_a softmax_a(h_a / t) s_a.

    Args:
        criteria: (N, C) scores r.
        criterion_gates: (N, C) logits g, or (1, C) for all clips; the softmax runs within an aspect.
        aspect_gates: (N, A) logits h, or (1, A).
        groups: for each of the A aspects, the columns of its criteria.
        temperature: t, of both.
    Source: MJ-VIDEO (arXiv 2502.01719), `scripts/model/moe_reward.py` of aiming-lab/MJ-Video.
    """
    gates = [torch.softmax(criterion_gates[:, list(group)] / temperature, 1) for group in groups]
    columns = [(gate * criteria[:, list(group)]).sum(1) for gate, group in zip(gates, groups, strict=True)]
    aspects = torch.stack(columns, 1)
    return Mixture(aspects, (torch.softmax(aspect_gates / temperature, 1) * aspects).sum(1))


class Aspects(Reward):
    """A reward whose dims are grouped into aspects; see `aspects`."""

    def __init__(
        self, reward: Reward, groups: Groups, weights: Mapping[str, float] | None = None, name: str | None = None
    ):
        self.inner = lift(reward)
        self.name = name or self.inner.name
        criteria, weights = _weights(reward, groups, weights, self.name)
        self.groups = {aspect: list(shares) for aspect, shares in criteria.items()}
        # The softmax of logarithms is the weights, divided by their sum.
        self.criterion_gates = torch.tensor([[w for shares in criteria.values() for w in shares.values()]]).log()
        self.aspect_gates = torch.tensor([[weights[aspect] for aspect in criteria]]).log()
        self.scope, self.differentiable = self.inner.scope, self.inner.differentiable

    @property
    def is_async(self) -> bool:
        return self.inner.is_async

    def indices(self, length: int, fps: float) -> list[int]:
        return self.inner.indices(length, fps)

    def score(self, clips: Sequence[Clip]) -> Scores | Awaitable[Scores]:
        return self._awaited(clips) if self.is_async else self._mixed(self.inner(clips))

    async def _awaited(self, clips: Sequence[Clip]) -> Scores:
        return self._mixed(self.inner._checked(await self.inner._started(clips), len(clips)))

    def _mixed(self, scores: Scores) -> Scores:
        names = [criterion for group in self.groups.values() for criterion in group]
        missing = [name for name in names if name not in scores.dims]
        if missing:
            known = ", ".join(scores.dims) or "none"
            raise RewardError(f"reward {self.name}: no dims {', '.join(missing)} in {self.inner.name}; it has {known}")
        taken = sorted(self.groups.keys() & scores.dims.keys())
        if taken:
            raise RewardError(f"reward {self.name}: {', '.join(taken)} is a dim already; call the aspect otherwise")
        criteria = torch.stack([scores.dims[name] for name in names], 1)
        columns = [[names.index(criterion) for criterion in group] for group in self.groups.values()]
        found = mixture(criteria, self.criterion_gates.to(criteria), self.aspect_gates.to(criteria), columns)
        dims = dict(zip(self.groups, found.aspects.unbind(1), strict=True)) | scores.dims
        return Scores(found.total, dims, scores.dense, scores.valid)


def aspects(
    reward: Reward, groups: Groups, weights: Mapping[str, float] | None = None, name: str | None = None
) -> Reward:
    """Group what a reward reports in `dims` into aspects, and make the total of these.

    An aspect is the weighted mean of its criteria, and `total` that of the aspects: `mixture` with gates that do not
    depend on the clip. `dims` are the aspects and the reward's own; dense, scope and validity are the reward's, and a
    clip without one of the criteria is invalid.

    Args:
        reward: one with dims, e.g. `vlm_score`, or `weighted`, whose dims are its parts.
        groups: aspect -> names of its criteria, or criterion -> weight. A criterion belongs to one aspect.
        weights: aspect -> weight; None: all alike.
    Raises: RewardError, one line: a weight that is not above 0; when called, a criterion that is not among the dims.
    """
    return Aspects(reward, groups, weights, name)


def _weights(
    reward: Any, groups: Groups, weights: Mapping[str, float] | None = None, name: str | None = None
) -> tuple[dict[str, dict[str, float]], Mapping[str, float]]:
    """Aspect -> criterion -> weight, and aspect -> weight."""
    for option, value in (("groups", groups), ("weights", weights or {})):
        if not isinstance(value, Mapping):
            raise RewardError(f"reward {name}: {option} is {value!r}, expected aspects and values")
    criteria = {a: dict(g) if isinstance(g, Mapping) else dict.fromkeys(g, 1.0) for a, g in groups.items()}
    weights = dict.fromkeys(criteria, 1.0) if weights is None else weights
    if weights.keys() != criteria.keys():
        raise RewardError(f"reward {name}: aspects {sorted(criteria)} and weights {sorted(weights)} must name the same")
    for what, shares in {"weights": weights, **criteria}.items():
        if not shares or not all(isinstance(w, (int, float)) and 0 < w < math.inf for w in shares.values()):
            raise RewardError(f"reward {name}: {what} is {dict(shares)}, expected one number above 0 or more")
    named = [criterion for shares in criteria.values() for criterion in shares]
    twice = sorted({criterion for criterion in named if named.count(criterion) > 1})
    if twice:
        raise RewardError(f"reward {name}: {', '.join(twice)} in more than one aspect")
    return criteria, weights


aspects.check = _weights  # what `rewards.check` asks
