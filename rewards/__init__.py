"""Rewards for video: what a reward is, the known ones, and the way to one of your own.

    from rewards import Clip, load
    reward = load("clip", path="folder/of/an/open_clip/checkpoint")     # or load("my_reward.py:calm", limit=0.1)
    scores = reward(videos, prompts, fps=16)                            # videos (N, F, 3, H, W) in [0, 1]
    scores = reward([Clip(video, "a red circle moving left")])          # or clips, which may differ in size

Importing this package costs torch and nothing else; a reward's own dependencies are imported when it is loaded.
"""

from rewards.combine import weighted
from rewards.comparison import win_rate
from rewards.contract import Clip, Reward, RewardError, Scores, answers, lift
from rewards.frames import per_frame
from rewards.known import KNOWN
from rewards.loading import check, load
from rewards.mixture import aspects
from rewards.remote import remote
from rewards.statistics import image_statistics
from rewards.video_files import clip_from_file, read_video

__all__ = [
    "KNOWN",
    "Clip",
    "Reward",
    "RewardError",
    "Scores",
    "answers",
    "aspects",
    "check",
    "clip_from_file",
    "image_statistics",
    "lift",
    "load",
    "per_frame",
    "read_video",
    "remote",
    "weighted",
    "win_rate",
]
