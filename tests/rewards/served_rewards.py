"""Rewards that show how a server calls them."""

import time
from pathlib import Path

import torch

from rewards import Reward, RewardError, Scores


class Shows(Reward):
    """Mean brightness; dims show the call's number, how many clips it had, and what each clip was.

    A call takes some seconds, and does not end before there is a file `gate`.
    """

    def __init__(self, seconds: float = 0.0, scope: str = "clip", name: str = "shows", gate: str | None = None):
        self.name, self.scope, self.seconds, self.gate, self.calls = name, scope, seconds, gate, 0

    def score(self, clips):
        self.calls += 1
        time.sleep(self.seconds)
        while self.gate and not Path(self.gate).exists():
            time.sleep(0.01)
        total = torch.stack([clip.video.mean() for clip in clips])
        groups = [clip.group for clip in clips]
        if self.scope == "group":  # seen from its group alone
            total = torch.stack([total[i] - total[[g == groups[i] for g in groups]].mean() for i in range(len(clips))])
        dims = {
            "call": [self.calls] * len(clips),
            "clips": [len(clips)] * len(clips),
            "members": [groups.count(group) for group in groups],
            "frames": [len(clip.video) for clip in clips],
            "fps": [clip.fps for clip in clips],
            "meta": [clip.meta.get("number", -1.0) for clip in clips],
        }
        return Scores(total, {name: torch.tensor(values, dtype=torch.float32) for name, values in dims.items()})


class Few(Shows):
    """Looks at 5 frames at most, evenly spaced, and has a value a frame."""

    def indices(self, length, fps):
        return list(range(0, length, -(-length // 5)))

    def score(self, clips):
        seen = [clip.frames(self.indices(len(clip.video), clip.fps)) for clip in clips]
        dense = [clip.video.mean((1, 2, 3)) for clip in seen]
        scores = super().score(seen)
        scores.dims["sent"] = torch.tensor([float(len(clip.video)) for clip in clips])
        scores.dense = torch.stack(dense) if len({len(row) for row in dense}) == 1 else None
        return scores


class Picky(Reward):
    """Fails, refuses or has no number, as the prompts say."""

    name = "picky"

    def indices(self, length, fps):
        if length == 13:
            raise KeyError("thirteen")
        return list(range(length))

    def score(self, clips):
        prompts = [clip.prompt for clip in clips]
        if "fail" in prompts:
            raise ValueError("cannot\ndigest this")
        if "exit" in prompts:
            raise SystemExit(3)
        if "refuse" in prompts:
            raise RewardError("reward picky: not this prompt")
        values = {"nan": float("nan"), "inf": float("inf")}
        total = torch.tensor([values.get(prompt, 1.0) for prompt in prompts])
        return Scores(total, {"reading": total}, total[:, None].repeat(1, 2))


def calm(videos, prompts, scale: float = 1.0):
    return 1 - scale * videos.diff(dim=1).abs().mean((1, 2, 3, 4))
