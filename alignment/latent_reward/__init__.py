"""Rewards on noised latents: the first blocks of a video transformer and a head.

    from alignment.latent_reward import LatentReward
    reward = LatentReward.load("runs/tiny_latent_reward")
    scores = reward.score(states, level, prompts)               # (B, D), with gradients to the states

or of clips, as any other reward: rewards.load("alignment.latent_reward:LatentClipReward", path="runs/...").
"""

from .clips import LatentClipReward
from .model import Design, LatentReward

__all__ = ["Design", "LatentClipReward", "LatentReward"]
