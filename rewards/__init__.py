"""Rewards for video: what a reward is, the known ones, and the way to one of your own.

    from rewards import Clip, load, score
    reward = load("clip", path="folder/of/an/open_clip/checkpoint")     # or load("my_reward.py:calm", limit=0.1)
    scores = score(reward, [Clip(video, "a red circle moving left")])   # video (F, 3, H, W) in [0, 1]

Importing this package costs torch and nothing else; a reward's own dependencies are imported when it is loaded.
"""

from rewards.combine import weighted
from rewards.contract import Clip, Reward, RewardError, Scores, lift, score
from rewards.loading import KNOWN, check, load
from rewards.statistics import image_statistics

__all__ = [
    "KNOWN",
    "Clip",
    "Reward",
    "RewardError",
    "Scores",
    "check",
    "image_statistics",
    "lift",
    "load",
    "score",
    "weighted",
]
