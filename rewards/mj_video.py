"""The head of MJ-VIDEO (arXiv 2502.01719): 28 criteria, 5 aspects and one score from two hidden states.

    head = load_head("MJ-VIDEO-2B")                   # the released .safetensors file, or its folder
    scores = head(last, closing)                      # from your own run of the backbone

What is here is the head alone. The backbone, InternVL2-2B, is published as code that is run from the checkpoint, which
this package does not do, and transformers has no class that reads its InternLM2 weights; so MJ-VIDEO is not known by
name and `rewards.load` cannot build it.

N clips, D hidden size of the backbone, C criteria, A aspects
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rewards.contract import RewardError
from rewards.mixture import mixture

# In the order of the head's outputs; 1 is good, -1 is bad (1 for "frame flickering" means that there is none).
ASPECTS = {
    "alignment": ("object", "attribute", "actions", "count", "location"),
    "safety": ("crime", "shocking", "disgust", "nsfw evasive", "nsfw subtle", "political sensitivity"),
    "fineness": (
        *("human face distortion", "human limb distortion", "object distortion"),
        *("de-focused blurred", "motion blurred"),
    ),
    "consistency": (
        *("spatial consistency", "action continuity", "object disappearance", "abrupt background changes"),
        *("inconsistent lighting shadows", "frame flickering", "object drift"),
    ),
    "bias": ("race", "age", "education", "job", "gender"),
}
PARTS = ("regression_layer.", "reward_transform_matrix", "aspect_gating.", "criteria_gating.")


class HeadScores(NamedTuple):
    """What the head gives; criteria and aspects in the order of its groups."""

    criteria: Tensor  # (N, C)
    aspects: Tensor  # (N, A)
    total: Tensor  # (N,)


class Gate(nn.Module):
    """Logits from a hidden state: linear layers with ReLU between them."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.logit_scale = nn.Parameter(torch.ones(1))  # despite its name, of the softmax

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = layer(x).relu()
        return self.layers[-1](x)


class MJVideoHead(nn.Module):
    """Regression of the criteria, and the gates that mix them; parameters are named as in the checkpoint.

    Args:
        hidden: D (2048).
        gate: widths of the hidden layers of both gates.
        groups: aspect -> names of its criteria.
        temperature: of both gates; 1 in all of the authors' scripts, and no part of the checkpoint.
    Source: `scripts/model/moe_reward.py` and `scripts/eval/eval_genai_mjvideo.py` of aiming-lab/MJ-Video.
    """

    def __init__(
        self,
        hidden: int,
        gate: Sequence[int] = (1024, 1024, 1024),
        groups: Mapping[str, Sequence[str]] = ASPECTS,
        temperature: float = 1.0,
    ):
        super().__init__()
        columns = iter(range(sum(map(len, groups.values()))))
        self.groups = [[next(columns) for _ in criteria] for criteria in groups.values()]
        num = sum(map(len, self.groups))
        self.temperature = temperature
        self.regression_layer = nn.Linear(hidden, num, bias=False)
        self.reward_transform_matrix = nn.Parameter(torch.eye(num), requires_grad=False)
        self.aspect_gating = Gate((hidden, *gate, len(groups)))
        self.criteria_gating = Gate((hidden, *gate, num))

    def forward(self, last: Tensor, closing: Tensor) -> HeadScores:
        """Score clips by hidden states of the backbone's last layer, behind its final norm.

        Args:
            last: (N, D) at the last token of the prompt, which ends in the assistant's empty turn.
            closing: (N, D) at the token <|im_end|> that closes the user's turn: where the last occurrence of the ids
                92542, 92543, 525, 11353, 364 begins.
        """
        criteria = self.regression_layer(last) @ self.reward_transform_matrix
        gates = self.criteria_gating(closing), self.aspect_gating(closing)
        aspects, total = mixture(criteria, *gates, self.groups, self.temperature)
        aspects = aspects * self.criteria_gating.logit_scale
        return HeadScores(criteria, aspects, total * self.criteria_gating.logit_scale * self.aspect_gating.logit_scale)


def load_head(path: str | Path, temperature: float = 1.0) -> MJVideoHead:
    """Read the head out of a released checkpoint, without reading the backbone; float32, in evaluation mode.

    Args: path: a .safetensors file, or a folder of such files, which together hold every part of the head.
    Raises: RewardError, one line, for files that are missing or damaged, or hold no such head.
    """
    files = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else [Path(path)]
    state: dict[str, Tensor] = {}
    for file in files:
        state |= _read_parts(file)
    if "regression_layer.weight" not in state:
        raise RewardError(
            f"reward mj_video: no regression_layer.weight in {path}; expected the .safetensors of MJ-VIDEO"
        )
    num, hidden = state["regression_layer.weight"].shape
    expected = sum(map(len, ASPECTS.values()))
    if num != expected:
        raise RewardError(f"reward mj_video: {path} has {num} criteria, expected {expected}")
    biases = [state[key] for i in range(len(state)) if (key := f"aspect_gating.layers.{i}.bias") in state]
    head = MJVideoHead(hidden, [len(bias) for bias in biases[:-1]], temperature=temperature)
    try:
        head.load_state_dict(state)
    except RuntimeError as error:
        raise RewardError(
            f"reward mj_video: {path} holds another head: {' '.join(str(error).split())[:300]}"
        ) from error
    return head.eval()


def _read_parts(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as weights:
            return {key: weights.get_tensor(key).float() for key in weights.keys() if key.startswith(PARTS)}  # noqa: SIM118
    except FileNotFoundError as error:
        raise RewardError(f"reward mj_video: no weights file {file}") from error
    except (OSError, SafetensorError) as error:
        raise RewardError(f"reward mj_video: {file} cannot be read; copy it again ({error})") from error
