"""HPSv3, a wide-spectrum human preference score of images, on Qwen2-VL-7B.

HPSv3 (arXiv 2508.03789), https://github.com/MizzenAI/HPSv3; weights MizzenAI/HPSv3. Two outputs an image, the mean and
the logarithm of the deviation of its score; the mean is the reward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rewards.checkpoints import is_hub_id, read_tensors, snapshot
from rewards.contract import Clip, RewardError, Scores
from rewards.frames import FrameReward, frame_plan
from rewards.qwen2_vl import DTYPES, TEMPLATE_FILE, Qwen2VLReward
from rewards.qwen2_vl_reader import read_prompt, resized, smart_resize

TOKEN = "<|Reward|>"
ORIGIN = "HPSv3/hpsv3/dataset/data_collator_qwen.py"  # of the prompt
PIXELS = 256 * 28 * 28  # of an image, as nearly as its ratio allows: both bounds of the authors' resizing


class HPSv3(FrameReward):
    """Human preference for a clip's frames, about -5 to 15; dim sigma is the deviation that the model expects.

    Differentiable in the video.

    Args:
        path: the weights (HPSv3.safetensors), a folder with them, or the hub id. The authors' prompt is part of the
            format: prompt_template.txt beside the weights (`python -m rewards.extract_template` writes it from their
            data_collator_qwen.py), or
        template: its file.
        frames, select, weights, seed: which frames count, and how much; see rewards.per_frame.
        base: the Qwen2-VL that was tuned: folder or hub id; only small files are taken from it.
        dtype: of the model; None: bfloat16 on a GPU, float32 elsewhere. The head is always float32.
        batch_size: frames at once.
    Raises: RewardError for a checkpoint that is incomplete or does not fit, and for a prompt with a special token.
    """

    differentiable = True

    def __init__(
        self,
        path: str = "MizzenAI/HPSv3",
        *,
        base: str = "Qwen/Qwen2-VL-7B-Instruct",
        template: str | None = None,
        pixels: int = PIXELS,
        frames: int | None = 8,
        select: str = "uniform",
        weights: str | Mapping[str, float] = "mean",
        seed: int = 0,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        batch_size: int = 8,
        name: str = "hpsv3",
    ):
        self.check(path, template=template, dtype=dtype, batch_size=batch_size)
        super().__init__(name, frame_plan(name, frames, select, weights, seed))
        file = find_weights(path)
        self.template = read_template(file.parent, template)
        self.pixels, self.batch_size = pixels, batch_size
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
        self.model = Qwen2VLReward(
            "hpsv3", base, read_tensors("hpsv3", file), head, [TOKEN], device=device, dtype=DTYPES[dtype]
        )

    @staticmethod
    def check(
        path: str = "MizzenAI/HPSv3",
        *,
        template: str | None = None,
        dtype: str | None = None,
        batch_size: int = 8,
        frames: int | None = 8,
        select: str = "uniform",
        weights: str | Mapping[str, float] = "mean",
        **_: Any,
    ) -> None:
        """Validate the options and the small files; what lies on the hub is not fetched."""
        frame_plan("hpsv3", frames, select, weights)
        if not isinstance(batch_size, int) or batch_size < 1:
            raise RewardError(f"reward hpsv3: batch_size {batch_size!r}: expected a positive whole number")
        if dtype is not None and dtype not in DTYPES:
            raise RewardError(f"reward hpsv3: dtype {dtype!r} is none of {', '.join(DTYPES)}")
        if not is_hub_id(path):
            read_template(find_weights(path).parent, template)

    def score_frames(self, frames: Sequence[Clip]) -> Scores:
        parts = []
        with torch.autocast(self.model.device.type, enabled=False):
            for start in range(0, len(frames), self.batch_size):
                part = frames[start : start + self.batch_size]
                patches = [self.model.patches(self.prepared(frame.video)) for frame in part]
                parts.append(self.model.scores("image", [self.chat(frame.prompt) for frame in part], patches))
        mean, log_sigma = torch.cat(parts).squeeze(1).to(frames[0].video.device).unbind(-1)
        return Scores(mean, {"sigma": log_sigma.exp()})

    def chat(self, prompt: str) -> str:
        self.model.check_prompt(prompt)
        return self.model.chat("image", self.template.replace("{text_prompt}", prompt))

    def prepared(self, frame: Tensor) -> Tensor:
        """(1, 3, h, w) in [0, 255] in the size that the model takes."""
        try:
            size = smart_resize(*frame.shape[-2:], self.model.factor, self.pixels, self.pixels)
        except ValueError as error:
            raise RewardError(f"reward hpsv3: {error}") from error
        return resized(frame.to(self.model.device), *size)


def head(hidden: int) -> nn.Module:
    """The authors' "ranknet"."""
    return nn.Sequential(
        nn.Linear(hidden, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )


def find_weights(path: str) -> Path:
    """The one weights file that `path` names or holds. Raises: RewardError, one line."""
    if Path(path).is_file():
        return Path(path)
    folder = snapshot("hpsv3", path, ["HPSv3.safetensors", "*.txt"])
    found = sorted(folder.glob("*.safetensors"))
    if len(found) != 1:
        raise RewardError(f"reward hpsv3: {folder} holds {len(found)} .safetensors files, expected HPSv3.safetensors")
    return found[0]


def read_template(folder: Path, path: str | None) -> str:
    """The authors' instruction followed by their question. Raises: RewardError, one line."""
    return read_prompt("hpsv3", Path(path) if path else folder / TEMPLATE_FILE, [TOKEN], ORIGIN)
