"""A reward of your own, used by its place: `examples/my_reward.py:calm` or `examples/my_reward.py:Colourful`.

from rewards import load
scores = load("examples/my_reward.py:calm", limit=0.05)(videos, prompts)
"""

import torch

from rewards import Scores, image_statistics


def calm(videos, prompts, limit: float = 0.1):
    """1 for a still clip, 0 for one whose pixels change by `limit` a frame. videos: (N, F, 3, H, W) in [0, 1]."""
    motion = (videos[:, 1:] - videos[:, :-1]).abs().mean((1, 2, 3, 4))  # (N,)
    return (1 - motion / limit).clamp(0, 1)


class Colourful:
    """A class has options of its own, sees whole clips (fps, group, meta) and may report more than one number."""

    name, scope, differentiable = "colourful", "clip", False

    def __init__(self, target_bits: float = 6.0):
        self.target_bits = target_bits

    def __call__(self, clips):
        statistics = [image_statistics(clip.video[None]) for clip in clips]
        bits = torch.cat([row["colour_entropy"] for row in statistics])
        saturation = torch.cat([row["saturation"] for row in statistics])
        return Scores((bits / self.target_bits).clamp(max=1), dims={"bits": bits, "saturation": saturation})
