"""Plain image statistics to log beside a reward: a policy that cheats a reward usually moves one of them first.

N clips, F frames, H W pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

EDGE = 0.1  # luma difference between neighbours, of a full range of 1, above which a pixel lies on an edge
LEVELS = 8  # per channel; 512 colours
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601


def image_statistics(video: Tensor) -> dict[str, Tensor]:
    """Measure every clip with five numbers, each the mean over its frames.

    edge_density    [0, 1]   share of pixels where the luma steps to the right and lower neighbour, taken together as
                             sqrt(dx^2 + dy^2), exceed 0.1; the last row and column have no neighbour and do not count
    colour_entropy  [0, 9]   bits, entropy of a frame's histogram over 8 x 8 x 8 colours
    brightness      [0, 1]   luma
    saturation      [0, 1]   (max - min) / max over the channels, 0 for black
    motion          [0, 1]   absolute difference between consecutive frames; 0 for a single frame

    Args:
        video: (N, F, 3, H, W) float in [0, 1], H and W at least 2. Values outside are clamped.
    Returns: name -> (N,) float32 on the video's device, without gradients.
    Raises: ValueError for another shape or type.
    """
    if video.ndim != 5 or video.shape[2] != 3 or min(video.shape[3:]) < 2 or not video.is_floating_point():
        raise ValueError(
            f"video is {video.dtype} {tuple(video.shape)}, expected float (N, F, 3, H, W) with H and W at least 2"
        )
    # One clip at a time: several copies of a batch of real videos would not fit beside a model.
    rows = [_of_clip(clip.detach().float().clamp(0, 1)) for clip in video]
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _of_clip(clip: Tensor) -> dict[str, Tensor]:
    luma = (clip * clip.new_tensor(LUMA).view(3, 1, 1)).sum(1)  # (F, H, W)
    dx = luma[:, :-1, 1:] - luma[:, :-1, :-1]
    dy = luma[:, 1:, :-1] - luma[:, :-1, :-1]
    high, low = clip.amax(1), clip.amin(1)
    return {
        "edge_density": (dx.square() + dy.square() > EDGE**2).float().mean(),
        "colour_entropy": _colour_entropy(clip),
        "brightness": luma.mean(),
        "saturation": torch.where(high > 0, (high - low) / high.clamp_min(1e-6), 0.0).mean(),
        "motion": (clip[1:] - clip[:-1]).abs().mean() if len(clip) > 1 else clip.new_zeros(()),
    }


def _colour_entropy(clip: Tensor) -> Tensor:
    """() bits, mean over the frames of (F, 3, H, W)."""
    level = (clip * LEVELS).long().clamp_max(LEVELS - 1)
    colour = (level[:, 0] * LEVELS + level[:, 1]) * LEVELS + level[:, 2]  # (F, H, W)
    frame = torch.arange(len(clip), device=clip.device).view(-1, 1, 1)
    bins = LEVELS**3
    count = torch.bincount((colour + frame * bins).flatten(), minlength=len(clip) * bins).view(len(clip), bins)
    share = count.float() / colour[0].numel()
    return torch.special.entr(share).sum(1).mean() / torch.log(share.new_tensor(2.0))
