"""Clips to ask rewards about, and a function that is a reward."""

import torch

from rewards import Clip

PROMPTS = [
    "a red circle moving right quickly on a black background",
    "a blue square moving up slowly on a white background",
    "a green triangle",
]


def mean_brightness(videos, prompts):
    return videos.mean((1, 2, 3, 4)) + torch.tensor([len(prompt) / 1000 for prompt in prompts], device=videos.device)


def sprites(num=3, frames=6, size=32):
    """Clips (N, F, 3, H, W): squares of three sizes and colours that drift over plain backgrounds."""
    video = torch.zeros(num, frames, 3, size, size)
    colours = torch.tensor([[0.9, 0.1, 0.1], [0.15, 0.25, 0.95], [0.1, 0.75, 0.15]])
    for clip in range(num):
        video[clip] = 0.05 + 0.45 * clip
        for frame in range(frames):
            left, side = 4 + frame + clip, 9 + clip
            video[clip, frame, :, 8 : 8 + side, left : left + side] = colours[clip % 3][:, None, None]
    return video


def clips_on(device="cpu", video=None, prompts=PROMPTS):
    video = sprites() if video is None else video
    return [Clip(one.to(device), prompt) for one, prompt in zip(video, prompts, strict=True)]
