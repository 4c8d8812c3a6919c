"""LAION's aesthetic predictor: how beautiful people find an image, whatever it shows, from its CLIP embedding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.checkpoints import read_tensors
from rewards.contract import RewardError
from rewards.encoders.clip_checkpoints import find
from rewards.encoders.encoder import EmbeddingReward, Source, check_options

HEAD = "sac+logos+ava1-l14-linearMSE.pth"
LAYERS = (0, 2, 4, 6, 7)  # linear ones, as the file counts them; the others are dropout
DEFAULT = {"model": "ViT-L-14", "pretrained": "openai"}


class AestheticReward(EmbeddingReward):
    """Mean over frames of a rating from 1 to 10, an affine function of the image's unit embedding.

    Prompts do not count. Differentiable in the video. The published head is five linear layers with nothing but dropout
    between them, so it is read as the one affine map that they are.

    Args:
        head: sac+logos+ava1-l14-linearMSE.pth, from github.com/christophschuhmann/improved-aesthetic-predictor, or a
            head of the same form for another embedding.
        model, pretrained, path: the CLIP model of the embedding, named as for rewards.clip.CLIPReward; by default
            OpenAI's ViT-L/14, to which the published head belongs, downloaded on first use.
        frames, select, weights, seed: which frames count, and how much; see rewards.per_frame.
        device, precision, batch_size: see rewards.encoders.encoder.EmbeddingReward.
    Raises: RewardError for files that are missing, damaged or of another form, and for a head of another width.
    Source: christophschuhmann/improved-aesthetic-predictor: simple_inference.py.
    """

    def __init__(
        self,
        head: str | Path | None = None,
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
        name: str = "aesthetic",
    ):
        source = self.check(head, model, pretrained, path, name=name)
        weight, bias = affine(name, Path(head))
        super().__init__(
            source,
            name,
            frames=frames,
            select=select,
            weights=weights,
            seed=seed,
            device=device,
            precision=precision,
            batch_size=batch_size,
        )
        width = self.encoder.prompts([""]).shape[1]
        if len(weight) != width:
            raise RewardError(
                f"reward {name}: {head} is for embeddings of {len(weight)} numbers, the model gives {width}"
            )
        self.weight, self.bias = weight.to(self.encoder.device), bias.to(self.encoder.device)

    @staticmethod
    def check(
        head: str | Path | None = None,
        model: str | Path | None = None,
        pretrained: str | None = None,
        path: str | Path | None = None,
        name: str = "aesthetic",
        **options: Any,
    ) -> Source:
        """Validate the options and look for the files without reading weights."""
        check_options(name, **options)
        if head is None or not Path(head).is_file():
            raise RewardError(
                f"reward {name}: no file {head or 'named as head'}; {HEAD} is in the repository "
                "github.com/christophschuhmann/improved-aesthetic-predictor"
            )
        named = {"model": model, "pretrained": pretrained, "path": path}
        return find(name, **(named if any(named.values()) else DEFAULT | {"path": None}))

    def compare(self, image: Tensor, prompts: Sequence[str]) -> Tensor:
        return image @ self.weight + self.bias


def affine(name: str, head: Path) -> tuple[Tensor, Tensor]:
    """Read the layers of a head and multiply them out, in float64.

    Returns: float32 weight (D,) and bias (): the rating is embedding @ weight + bias.
    Raises: RewardError for a file of another form; one with activations counts its layers differently.
    """
    state = read_tensors(name, head)
    expected = {f"layers.{layer}.{part}" for layer in LAYERS for part in ("weight", "bias")}
    if state.keys() != expected:
        odd = ", ".join(sorted(state.keys() ^ expected)[:4])
        raise RewardError(
            f"reward {name}: {head} is not a head without activations, layers.{{0,2,4,6,7}}.weight and .bias; not in "
            f"both: {odd}"
        )
    weight, bias = (state[f"layers.0.{part}"].double() for part in ("weight", "bias"))
    try:
        for layer in LAYERS[1:]:
            matrix = state[f"layers.{layer}.weight"].double()
            weight, bias = matrix @ weight, matrix @ bias + state[f"layers.{layer}.bias"].double()
    except RuntimeError as error:
        raise RewardError(f"reward {name}: the layers of {head} do not fit together: {error}") from error
    return weight.squeeze(0).float(), bias.squeeze(0).float()
