"""HPSv2 and HPSv2.1: how much people like an image for its prompt, by a CLIP model tuned on their choices."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rewards.checkpoints import snapshot
from rewards.contract import RewardError
from rewards.encoders.clip_checkpoints import OpenClipSource, check_built_in, check_file, find_by_config
from rewards.encoders.encoder import EmbeddingReward, check_options
from rewards.encoders.images import CLIP_MEAN, CLIP_STD, letterbox

REPOSITORY = "xswu/HPSv2"
FILES = {"2.0": "HPS_v2_compressed.pt", "2.1": "HPS_v2.1_compressed.pt"}
MODEL = "ViT-H-14"


class HPSv2Reward(EmbeddingReward):
    """Mean over frames of the cosine between image and prompt, about 0.2 to 0.35.

    The authors' tables show 100 times that. Scores of versions 2.0 and 2.1 do not compare. Differentiable in the video.
    A prompt is cut after 77 tokens.

    Every frame is fitted into a black square of the model's size, never cropped, without going through bytes: a
    video that came from 8-bit files scores as the authors' code scores its images, and one that did not is not
    rounded first. The authors' code stops at an image that is not square and whose longer side is the model's size
    already; here it is padded like any other.

    Args:
        path: weights as published, {"state_dict": ...}, or the tensors alone, as .pt or .safetensors; by default those
            of `version` are downloaded on first use.
        model: an architecture that open_clip knows, or a .json file with one, as in open_clip/model_configs or as an
            open_clip_config.json (of which preprocess_cfg does not count: HPSv2 has a preparation of its own).
        version: "2.0" or "2.1", of the weights to download.
        antialias: whether the filter widens where it shrinks an image, as torchvision's does by default since 0.17 and
            did not before; the authors do not say which version they used.
        frames, select, weights, seed: which frames count, and how much; see rewards.per_frame.
        device, precision, batch_size: see rewards.encoders.encoder.EmbeddingReward.
    Raises: RewardError for weights that are missing, damaged, or not exactly those of the architecture.
    Source: HPSv2 (arXiv 2306.09341), tgxs002/HPSv2: hpsv2/img_score.py and src/open_clip/transform.py.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        model: str | Path = MODEL,
        version: str | float = "2.1",
        antialias: bool = True,
        *,
        frames: int | None = 8,
        select: str = "uniform",
        weights: str | Mapping[str, float] = "mean",
        seed: int = 0,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        batch_size: int = 64,
        name: str = "hpsv2",
    ):
        self.check(path, model, version, name=name)
        weights_file = Path(path) if path else _published(name, str(version))
        super().__init__(
            _source(name, model, weights_file),
            name,
            frames=frames,
            select=select,
            weights=weights,
            seed=seed,
            device=device,
            precision=precision,
            batch_size=batch_size,
        )
        size, _ = self.encoder.towers.size
        self.encoder.prepare = partial(letterbox, size=size, mean=CLIP_MEAN, std=CLIP_STD, antialias=antialias)

    @staticmethod
    def check(
        path: str | Path | None = None,
        model: str | Path = MODEL,
        version: str | float = "2.1",
        antialias: bool = True,
        name: str = "hpsv2",
        **options: Any,
    ) -> None:
        """Validate the options and look for the files without reading weights."""
        check_options(name, **options)
        if str(version) not in FILES:
            raise RewardError(f"reward {name}: version is {version!r}, expected one of {', '.join(FILES)}")
        if path is not None:
            _source(name, model, Path(path))
        elif model != MODEL:
            raise RewardError(f"reward {name}: the published weights are of {MODEL}; give those of {model} as path")


def _source(name: str, model: str | Path, weights: Path) -> OpenClipSource:
    if Path(model).suffix == ".json":
        return find_by_config(name, Path(model), weights)
    check_built_in(name, str(model))
    return OpenClipSource(str(model), str(weights), weights=check_file(name, weights))


def _published(name: str, version: str) -> Path:
    return snapshot(name, REPOSITORY, [FILES[version]]) / FILES[version]
