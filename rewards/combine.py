"""One reward made of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from rewards.contract import SCOPES, Clip, Reward, RewardError, Scores, answers, lift


class Weighted(Reward):
    """sum_k w_k total_k over named rewards; see `weighted`."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float], name: str):
        self.rewards, self.weights, self.name = {key: lift(r) for key, r in rewards.items()}, dict(weights), name
        counted = [reward for key, reward in self.rewards.items() if self.weights[key] != 0]
        self.scope = max((r.scope for r in self.rewards.values()), key=SCOPES.index)
        self.differentiable = all(reward.differentiable for reward in counted)

    def indices(self, length: int, fps: float) -> list[int]:
        # Of the frames of all parts together, a part would pick others than of the whole clip.
        looks = {tuple(reward.indices(length, fps)) for reward in self.rewards.values()}
        return list(looks.pop()) if len(looks) == 1 else list(range(length))

    def score(self, clips: Sequence[Clip]) -> Scores:
        device = clips[0].video.device
        total = torch.zeros(len(clips), device=device)
        valid = torch.ones(len(clips), dtype=torch.bool, device=device)
        dims = {}
        for key, part in answers(self.rewards, clips).items():
            if isinstance(part, Exception):
                raise part
            dims[key] = part.total.to(device)
            dims |= {f"{key}/{dim}": values.to(device) for dim, values in part.dims.items()}
            if self.weights[key] != 0:
                total = total + self.weights[key] * dims[key]  # NaN where a part is
                valid = valid & part.valid.to(device)
        return Scores(total, dims, valid=valid)


def weighted(
    rewards: Mapping[str, Reward], weights: Mapping[str, float] | None = None, name: str = "weighted"
) -> Reward:
    """Combine named rewards into one whose total is the weighted sum of theirs.

    A clip is valid where every part with a weight is; the widest scope is the scope; it is differentiable if every
    part with a weight is. `dims` hold each part's total under its name and its dims under `<name>/<dim>`. A weight of
    0 makes a part a watcher: it is called and shown in `dims`, and neither its number nor its masks count (what it
    raises is raised).

    Args:
        rewards: name -> reward, at least one.
        weights: name -> finite number, for exactly the same names; at least one is not 0. None: the mean of all, as
            AnimeReward (arXiv 2504.10044) combines its six experts, which judge smoothness, motion, appeal, and the
            consistency with the text, with the first image and of the characters. Its own experts cannot be loaded
            here: the published weights (IndexTeam/Index-anisora, reward/) run in the code of Mantis, MMAction2 and
            SAMURAI. Rewards that take their places, on like scales:
            `weighted({"appeal": load("aesthetic", ...), "text": load("clip", ...)}, name="experts")`.
    Raises: RewardError where names or weights do not fit.
    """
    return Weighted(rewards, _weights(rewards, weights, name), name)


def _weights(
    rewards: Mapping[str, Any], weights: Mapping[str, float] | None = None, name: str = "weighted"
) -> Mapping[str, float]:
    for option, value in (("rewards", rewards), ("weights", weights or {})):
        if not isinstance(value, Mapping):
            raise RewardError(f"reward {name}: {option} is {value!r}, expected names and values")
    weights = dict.fromkeys(rewards, 1 / max(1, len(rewards))) if weights is None else weights
    unmatched = set(rewards) ^ set(weights)
    if unmatched or not rewards:
        raise RewardError(f"reward {name}: rewards {sorted(rewards)} and weights {sorted(weights)} must name the same")
    bad = {key: w for key, w in weights.items() if not isinstance(w, (int, float)) or not math.isfinite(w)}
    if bad:
        raise RewardError(f"reward {name}: weights must be finite numbers, got {bad}")
    if not any(weights.values()):
        raise RewardError(f"reward {name}: every weight is 0, so there is nothing to maximise")
    return weights


weighted.check = _weights  # what `rewards.check` asks
