"""CLIP score of a video: the cosine between its frames and its prompt."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rewards.encoders.clip_checkpoints import find
from rewards.encoders.encoder import EmbeddingReward, Source, check_options


class CLIPReward(EmbeddingReward):
    """Mean cosine in [-1, 1] between a clip's frames and its prompt; `dense` holds the cosine of every frame.

    Differentiable in the video. Clips may differ in size and length. A prompt longer than the model's context (77
    tokens for most) is cut by the tokenizer. Images are prepared as the checkpoint's own PIL transform does, but on
    tensors, so that gradients reach the video.

    Args: a checkpoint in one of these ways:
            path: a folder in the format of open_clip (open_clip_config.json beside the weights) or of transformers
            (config.json with model_type clip), or on the hub "hf-hub:owner/name" (open_clip's format) or "owner/name"
            (that of transformers), downloaded on first use;
            model, pretrained: an architecture and a published tag of open_clip, downloaded on first use;
            model, path[, pretrained]: a local weights file (.pt, .safetensors, ...); the tag says which published
            weights it holds, and is needed where those of one architecture expect different image preparations;
            model, path: an open_clip architecture or open_clip_config.json as a .json file, and its weights file.
        frames, select, weights, seed: which frames count, and how much; see rewards.per_frame.
        device, precision, batch_size: see rewards.encoders.encoder.EmbeddingReward.
    Raises: RewardError for a checkpoint that is missing, damaged or of another architecture.
    Source: CLIPScore (arXiv 2104.08718) without its factor 2.5 and its clipping at 0.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        pretrained: str | None = None,
        path: str | Path | None = None,
        *,
        frames: int | None = 8,
        select: str = "uniform",
        weights: str | Mapping[str, float] = "mean",
        seed: int = 0,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        batch_size: int = 64,
        name: str = "clip",
    ):
        super().__init__(
            find(name, model, pretrained, path),
            name,
            frames=frames,
            select=select,
            weights=weights,
            seed=seed,
            device=device,
            precision=precision,
            batch_size=batch_size,
        )

    @staticmethod
    def check(
        model: str | Path | None = None,
        pretrained: str | None = None,
        path: str | Path | None = None,
        name: str = "clip",
        **options: Any,
    ) -> Source:
        """Validate the options and find the checkpoint without reading weights."""
        check_options(name, **options)
        return find(name, model, pretrained, path)
