"""PickScore: which of two images people pick for a prompt, by a CLIP model tuned on their choices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.contract import RewardError
from rewards.encoders.encoder import EmbeddingReward, check_options
from rewards.encoders.transformers_clip import PREPROCESSORS, TransformersSource

MODEL = "yuvalkirstain/PickScore_v1"
PROCESSOR = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
SCALES = ("logit", "cosine", "logit/26")


class PickScoreReward(EmbeddingReward):
    """Mean over frames of exp(logit_scale) times the cosine between image and prompt, about 15 to 26.

    Differentiable in the video. Images are prepared as the processor with PIL does, up to its rounding to bytes. A
    prompt that is longer than the model's context (77 tokens) is cut by the tokenizer.

    Args:
        path: a folder in the format of transformers, or owner/name on the hub, downloaded on first use.
        processor: the tokenizer and the preparation of images, likewise; by default the folder itself where it holds
            them, else what PickScore was trained with.
        scale: "logit" as published, "cosine" (DanceGRPO), or "logit/26", about 0.6 to 1 (Flow-GRPO).
        frames, select, weights, seed: which frames count, and how much; see rewards.per_frame.
        device, precision, batch_size: see rewards.encoders.encoder.EmbeddingReward.
    Raises: RewardError for a checkpoint that is missing, damaged or of another architecture.
    Source: Pick-a-Pic (arXiv 2305.01569), yuvalkirstain/PickScore.
    """

    def __init__(
        self,
        path: str | Path = MODEL,
        processor: str | Path | None = None,
        scale: str = "logit",
        *,
        frames: int | None = 8,
        select: str = "uniform",
        weights: str | Mapping[str, float] = "mean",
        seed: int = 0,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        batch_size: int = 64,
        name: str = "pickscore",
    ):
        super().__init__(
            self.check(path, processor, scale, name=name),
            name,
            frames=frames,
            select=select,
            weights=weights,
            seed=seed,
            device=device,
            precision=precision,
            batch_size=batch_size,
        )
        logit_scale = self.encoder.towers.model.logit_scale.float().exp()
        self.factor = {"logit": logit_scale, "cosine": 1.0, "logit/26": logit_scale / 26}[scale]

    @staticmethod
    def check(
        path: str | Path = MODEL,
        processor: str | Path | None = None,
        scale: str = "logit",
        name: str = "pickscore",
        **options: Any,
    ) -> TransformersSource:
        """Validate the options and look for the files without reading weights."""
        check_options(name, **options)
        if scale not in SCALES:
            raise RewardError(f"reward {name}: scale is {scale!r}, expected one of {', '.join(SCALES)}")
        if processor is None:
            complete = any((Path(path) / file).is_file() for file in PREPROCESSORS)
            processor = path if complete else PROCESSOR
        return TransformersSource.find(name, str(path), str(processor))

    def compare(self, image: Tensor, prompts: Sequence[str]) -> Tensor:
        return self.factor * super().compare(image, prompts)
