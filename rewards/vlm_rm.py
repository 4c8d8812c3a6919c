"""VLM-RM: how close an image is to a goal in words, seen along the way from a baseline in words to the goal.

M images, P prompts, D embedding
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rewards.contract import RewardError
from rewards.encoders.clip_checkpoints import find
from rewards.encoders.encoder import EmbeddingReward, Source, check_options
from rewards.encoders.images import squash


class GoalBaselineReward(EmbeddingReward):
    """Mean over frames of 1 - |P (x - t)|^2 / 2, at most 1, with P = alpha d d^T / |d|^2 + (1 - alpha) I and d = t - b.

    x, t and b are the unit embeddings of the image, the target and the baseline. alpha = 0 is the cosine of image and
    target; alpha = 1 counts only what lies between baseline and target. Differentiable in the video. As by the authors,
    frames are resized to the model's size without regard to their proportions.

    Args:
        baseline: words for what is there anyway ("a circle"), or several, of which the embeddings are averaged.
        target: words for the goal ("a circle that moves up"), likewise; None: every clip's own prompt.
        alpha: in [0, 1]. The authors choose it for every task.
        model, pretrained, path: the CLIP model, named as for rewards.clip.CLIPReward.
        frames, select, weights, seed: which frames count, and how much; see rewards.per_frame.
        device, precision, batch_size: see rewards.encoders.encoder.EmbeddingReward.
    Raises: RewardError for a checkpoint that is missing, damaged or of another architecture, and where target and
        baseline are the same. A clip whose own prompt is the baseline is masked.
    Source: VLM-RM (arXiv 2310.12921), AlignmentResearch/vlmrm: src/vlmrm/reward_model.py.
    """

    def __init__(
        self,
        baseline: str | Sequence[str],
        target: str | Sequence[str] | None = None,
        alpha: float = 0.5,
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
        name: str = "vlm_rm",
    ):
        super().__init__(
            self.check(baseline, target, alpha, model, pretrained, path, name=name),
            name,
            frames=frames,
            select=select,
            weights=weights,
            seed=seed,
            device=device,
            precision=precision,
            batch_size=batch_size,
        )
        towers = self.encoder.towers
        self.encoder.prepare = partial(squash, size=towers.size, mean=towers.mean, std=towers.std)
        self.alpha = alpha
        self.baseline = self._mean(baseline)
        self.target = None if target is None else self._mean(target)

    @staticmethod
    def check(
        baseline: str | Sequence[str],
        target: str | Sequence[str] | None = None,
        alpha: float = 0.5,
        model: str | Path | None = None,
        pretrained: str | None = None,
        path: str | Path | None = None,
        name: str = "vlm_rm",
        **options: Any,
    ) -> Source:
        """Validate the options and find the checkpoint without reading weights."""
        check_options(name, **options)
        if not 0 <= alpha <= 1:
            raise RewardError(f"reward {name}: alpha is {alpha}, expected a number from 0 to 1")
        if not baseline or target is not None and not target:
            raise RewardError(f"reward {name}: baseline is {baseline!r} and target {target!r}; both are words")
        for words in (baseline, target or baseline):
            if not all(isinstance(text, str) and text for text in _listed(words)):
                raise RewardError(f"reward {name}: {words!r} is not a text, or several")
        if target is not None and sorted(_listed(target)) == sorted(_listed(baseline)):
            raise RewardError(f"reward {name}: target and baseline are both {target!r}; there is no way between them")
        return find(name, model, pretrained, path)

    def compare(self, image: Tensor, prompts: Sequence[str]) -> Tensor:
        target = self.encoder.prompts(prompts) if self.target is None else self.target  # (M, D) or (D,)
        return goal_baseline(image, target, self.baseline, self.alpha)

    def _mean(self, prompts: str | Sequence[str]) -> Tensor:
        """Mean of unit embeddings, (D,), which is shorter than 1 where there are several."""
        with torch.autocast(self.encoder.device.type, enabled=False):
            return self.encoder.prompts(_listed(prompts)).mean(0)


def goal_baseline(image: Tensor, target: Tensor, baseline: Tensor, alpha: float) -> Tensor:
    """(M,) rewards of images (M, D) for a target (M, D) or (D,) and a baseline (D,); P is applied, never built."""
    direction = torch.nn.functional.normalize(target - baseline, dim=-1, eps=0)  # NaN where they are the same
    missing = image - target
    along = (missing * direction).sum(-1, keepdim=True) * direction
    return 1 - (alpha * along + (1 - alpha) * missing).square().sum(-1) / 2


def _listed(prompts: str | Sequence[str]) -> list[str]:
    return [prompts] if isinstance(prompts, str) else list(prompts)
