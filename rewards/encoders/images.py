"""Images as the encoders want them: resized, cropped or padded, and normalised, on tensors, so that gradients pass.

M images, H W their size, h w the model's
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torchvision.transforms.functional as TF
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of OpenAI's CLIP, and of LAION's that were trained after it
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC, BILINEAR = TF.InterpolationMode.BICUBIC, TF.InterpolationMode.BILINEAR


def prepare(images: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Resize, crop or pad, and normalise (M, 3, H, W) images in [0, 1] to (M, 3, h, w), as open_clip's transform does.

    Args:
        config: `preprocess_cfg` of an open_clip model: size, mean, std, interpolation, resize_mode, fill_color.
    """
    size, mode = config["size"], config["resize_mode"]
    target = (size, size) if isinstance(size, int) else tuple(size)
    shape = _resized_shape(images.shape[-2:], target, mode)
    filter_name = config["interpolation"]
    if mode == "shortest" and target[0] != target[1]:
        filter_name = "bicubic"  # open_clip 3.3 ignores the configuration in this one case
    images = resize_as_pil(images, shape, BILINEAR if filter_name == "bilinear" else BICUBIC)
    images = pad(images, target, config["fill_color"] / 255)
    return TF.normalize(TF.center_crop(images, list(target)), list(config["mean"]), list(config["std"]))


def resize_as_pil(images: Tensor, shape: Sequence[int], interpolation: TF.InterpolationMode) -> Tensor:
    """Resize (M, 3, H, W) images in [0, 1] to (M, 3, *shape).

    PIL resizes in bytes, one axis after the other, and after each clips what the filter overshoots (done here) and
    rounds (not done here, since rounding has no gradient): about one level of 255 at most remains between the two.
    """
    height, width = shape
    images = TF.resize(images.float(), [images.shape[-2], width], interpolation, antialias=True).clamp(0, 1)
    return TF.resize(images, [height, width], interpolation, antialias=True).clamp(0, 1)


def pad(images: Tensor, shape: Sequence[int], fill: float = 0.0) -> Tensor:
    """Pad images to at least `shape`, as much on either side; an odd pixel goes to the right and to the bottom."""
    down, across = (max(0, want - have) for want, have in zip(shape, images.shape[-2:], strict=True))
    if not down and not across:
        return images
    return TF.pad(images, [across // 2, down // 2, across - across // 2, down - down // 2], fill=fill)


def shortest_shape(shape: Sequence[int], size: int) -> tuple[int, int]:
    """Height and width with the shorter side at `size`; the longer one is truncated, as torchvision does."""
    short = min(shape)
    height, width = (size if side == short else int(size * side / short) for side in shape)
    return height, width


def longest_shape(shape: Sequence[int], size: int) -> tuple[int, int]:
    """Height and width with the longer side at `size`, both rounded (halves to even), and at least one pixel."""
    scale = size / max(shape)
    height, width = (max(1, round(side * scale)) for side in shape)
    return height, width


def _resized_shape(shape: Sequence[int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    if mode == "squash":
        return target
    if mode == "shortest" and target[0] == target[1]:
        return shortest_shape(shape, target[0])
    ratios = [have / want for have, want in zip(shape, target, strict=True)]
    ratio = max(ratios) if mode == "longest" else min(ratios)
    height, width = (round(side / ratio) for side in shape)  # open_clip rounds here, where torchvision truncates
    return height, width


def letterbox(images: Tensor, size: int, mean: Sequence[float], std: Sequence[float], antialias: bool = True) -> Tensor:
    """Fit (M, 3, H, W) images in [0, 1] into a black square and normalise them: (M, 3, size, size).

    What the bicubic filter overshoots stays, and so does every fraction of a level: nothing goes through bytes.
    """
    images = TF.resize(images, list(longest_shape(images.shape[-2:], size)), BICUBIC, antialias=antialias)
    return TF.normalize(pad(images, (size, size)), list(mean), list(std))


def squash(images: Tensor, size: Sequence[int], mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Resize (M, 3, H, W) images in [0, 1] to (M, 3, *size) without regard to their proportions, and normalise them."""
    return TF.normalize(TF.resize(images, list(size), BICUBIC, antialias=True), list(mean), list(std))
