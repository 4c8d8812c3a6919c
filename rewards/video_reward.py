"""VideoReward, the reward model of VideoAlign: visual quality, motion quality and text alignment of a video.

Improving Video Generation with Human Feedback (arXiv 2501.13918), https://github.com/KwaiVGI/VideoAlign at 219ab9d;
weights KlingTeam/VideoReward on Qwen/Qwen2-VL-2B-Instruct. Videos are scored as tensors; the authors score files, which
gives the same for what those files hold.

Models of other dimensions, and on successors of Qwen2-VL, are read as well, as alignment's reward_model trains them.

The text before each score does not hold the prompt for visual and motion quality: the model is causal and the prompt
comes last, so that only text alignment can see it. Training on VQ and MQ alone is blind to the prompt.

    B clips, T frames
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rewards.checkpoints import is_hub_id, read_json, read_tensors, snapshot
from rewards.contract import Clip, Reward, RewardError, Scores
from rewards.qwen2_vl import DTYPES, TEMPLATE_FILE, Qwen2VLReward, find_base
from rewards.qwen2_vl_reader import POSITIONS, read_prompt, resized, smart_resize

DIMENSIONS = ("VQ", "MQ", "TA")
TOKEN = "<|{}_reward|>"
TEMPLATE_HASHES = {"detailed_special": "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"}
MIN_PIXELS, MIN_FRAMES, MAX_FRAMES, FRAME_FACTOR = 128 * 28 * 28, 4, 768, 2
CHECKPOINT_FILES = ["*.json", "*.txt", "checkpoint-*/*"]


class Look(NamedTuple):
    """What of a clip is looked at."""

    fps: float = 2.0
    num_frames: int | None = None  # in place of a rate
    min_pixels: int = MIN_PIXELS  # of a frame
    max_pixels: int = 448 * 448


class Settings(NamedTuple):
    """What model_config.json and the files beside it say."""

    folder: Path
    weights: Path  # checkpoint-<step>/
    base: str
    frozen: str | None  # folder or hub id of the weights that were not trained, where base has none
    dimensions: tuple[str, ...]
    positions: str
    template: str
    look: Look
    output_dim: int
    lora_scale: float
    norm: dict[str, tuple[float, float]]  # dimension -> mean, standard deviation


class VideoReward(Reward):
    """VQ, MQ and TA of a video, each about N(0, 1) over the videos that it was trained on; total is their sum.

    Which dimensions there are is for the checkpoint to say.

    Differentiable in the video. Clips may differ in size and length; each needs two frames at least.

    Args:
        path: the released folder or its hub id: model_config.json, checkpoint-<step>/ with model.pth, or with
            adapter_model.safetensors and non_lora_state_dict.pth, and prompt_template.txt, which belongs to the
            checkpoint and is byte-exact (`python -m rewards.extract_template` writes it from VideoAlign's
            prompt_template.py).
        base: the Qwen2-VL that was tuned, where it is not the one inside `path` or named in model_config.json.
        template: the prompt template, where it is not beside model_config.json.
        step: of the checkpoint; None: the last.
        use_norm: subtract the mean and divide by the deviation that model_config.json names; False: raw scores.
        fps: frames a second to look at, num_frames: or a fixed number; None: as model_config.json says.
        weights: of the dimensions in the total. None: 1 for each, which is the authors' Overall.
        dtype: of the model; None: bfloat16 on a GPU, float32 elsewhere. The head is always float32.
        batch_size: clips at once.
    Raises: RewardError for a checkpoint that is incomplete or does not fit, and for a prompt with a special token.
    """

    differentiable = True

    def __init__(
        self,
        path: str = "KlingTeam/VideoReward",
        *,
        base: str | None = None,
        template: str | None = None,
        step: int | None = None,
        use_norm: bool = True,
        fps: float | None = None,
        num_frames: int | None = None,
        weights: Sequence[float] | None = None,
        device: str | torch.device | None = None,
        dtype: str | None = None,
        batch_size: int = 4,
        name: str = "video_reward",
    ):
        self._check_values(weights, fps, num_frames, dtype, batch_size)
        settings = read_settings(path, base, template, step)
        self.weights = weights_of(weights, settings.dimensions)
        if num_frames is not None:
            settings = settings._replace(look=settings.look._replace(num_frames=num_frames))
        elif fps is not None:
            settings = settings._replace(look=settings.look._replace(fps=fps, num_frames=None))
        self.settings, self.name, self.use_norm, self.batch_size = settings, name, use_norm, batch_size
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = dtype or ("bfloat16" if device.type == "cuda" else "float32")
        self.model = Qwen2VLReward(
            "video_reward",
            settings.base,
            read_state(settings),
            lambda hidden: nn.Linear(hidden, settings.output_dim, bias=False),
            [TOKEN.format(name) for name in settings.dimensions],
            lora_scale=settings.lora_scale,
            positions=settings.positions,
            frozen=settings.frozen,
            device=device,
            dtype=DTYPES[dtype],
        )

    @staticmethod
    def check(
        path: str = "KlingTeam/VideoReward",
        *,
        base: str | None = None,
        template: str | None = None,
        step: int | None = None,
        weights: Sequence[float] | None = None,
        fps: float | None = None,
        num_frames: int | None = None,
        dtype: str | None = None,
        batch_size: int = 4,
        **_: Any,
    ) -> None:
        """Validate the options and the small files; what lies on the hub is not fetched."""
        VideoReward._check_values(weights, fps, num_frames, dtype, batch_size)
        if not is_hub_id(path):
            weights_of(weights, read_settings(path, base, template, step).dimensions)

    @staticmethod
    def _check_values(weights: Any, fps: Any, num_frames: Any, dtype: Any, batch_size: Any) -> None:
        wrong = {
            f"weights {weights!r}: expected a list of numbers": not isinstance(weights, (list, tuple, type(None))),
            f"fps {fps}: expected a positive number": fps is not None and not fps > 0,
            f"num_frames {num_frames}: expected 2 or more": num_frames is not None and not num_frames >= FRAME_FACTOR,
            "fps and num_frames exclude each other": fps is not None and num_frames is not None,
            f"dtype {dtype!r} is none of {', '.join(DTYPES)}": dtype is not None and dtype not in DTYPES,
            f"batch_size {batch_size!r}: expected a positive whole number": not isinstance(batch_size, int)
            or batch_size < 1,
        }
        for message in (message for message, is_wrong in wrong.items() if is_wrong):
            raise RewardError(f"reward video_reward: {message}")

    def indices(self, length: int, fps: float) -> list[int]:
        return rate_indices(length, fps, self.settings.look.fps, self.settings.look.num_frames)

    def score(self, clips: Sequence[Clip]) -> Scores:
        device = clips[0].video.device
        with torch.autocast(self.model.device.type, enabled=False):
            chats = [self.chat(clip.prompt) for clip in clips]
            parts = []
            for start in range(0, len(clips), self.batch_size):
                part = slice(start, start + self.batch_size)
                patches = [self.model.patches(*self.frames(clip)) for clip in clips[part]]
                parts.append(self.model.scores("video", chats[part], patches))
            raw = torch.cat(parts).to(device)  # (B, dimensions, outputs)
        raw = raw.squeeze(-1) if self.settings.output_dim == 1 else raw.diagonal(dim1=1, dim2=2)
        dims = dict(zip(self.settings.dimensions, raw.unbind(1), strict=True))
        if self.use_norm:
            dims = {name: (dims[name] - mean) / std for name, (mean, std) in self.settings.norm.items()}
        return Scores(sum(weight * dims[name] for name, weight in self.weights.items()), dims)

    def chat(self, prompt: str) -> str:
        self.model.check_prompt(prompt)
        return self.model.chat("video", self.settings.template.replace("{text_prompt}", prompt))

    def frames(self, clip: Clip) -> tuple[Tensor, float]:
        """See `looked_at`."""
        return looked_at(clip.video, clip.fps, self.settings.look, self.model.factor, self.model.device)


def looked_at(
    video: Tensor, fps: float, look: Look, factor: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, float]:
    """The frames that are looked at, in the size that the model takes.

    Args:
        video: (F, 3, H, W) in [0, 1], or bytes.
        fps: its rate.
        factor: what the sides of a frame are multiples of.
    Returns: (T, 3, h, w) bytes as float, and the seconds from one frame to the next.
    Raises: RewardError, one line, for a clip of one frame and for frames like a ribbon.
    """
    chosen = rate_indices(len(video), fps, look.fps, look.num_frames)
    try:
        size = smart_resize(*video.shape[-2:], factor, look.min_pixels, look.max_pixels)
    except ValueError as error:
        raise RewardError(f"reward video_reward: {error}") from error
    frames = video[chosen].to(device)  # before they become floats: a film of bytes may be long
    frames = frames if frames.is_floating_point() else frames.float() / 255
    return resized(frames, *size), (chosen[-1] - chosen[0]) / (len(chosen) - 1) / fps


def weights_of(weights: Sequence[float] | None, dimensions: Sequence[str]) -> dict[str, float]:
    """The weight of each dimension. Raises: RewardError, one line."""
    weights = [1.0] * len(dimensions) if weights is None else list(weights)
    good = [weight for weight in weights if isinstance(weight, (int, float)) and math.isfinite(weight)]
    if not len(weights) == len(good) == len(dimensions):
        raise RewardError(
            f"reward video_reward: weights {weights}: expected a number for each of {', '.join(dimensions)}"
        )
    return dict(zip(dimensions, weights, strict=True))


def rate_indices(length: int, fps: float, wanted_fps: float, num_frames: int | None = None) -> list[int]:
    """Evenly spaced frames, an even number: about `wanted_fps` a second and four at least, or about `num_frames`.

    A clip of fewer than `num_frames` gives all of its frames; an odd last one is then shown twice.

    Source: VideoAlign, vision_process.py. Raises: RewardError for a clip of one frame.
    """
    if length < FRAME_FACTOR:
        raise RewardError(f"reward video_reward: a clip has {length} frame, expected 2 or more")
    if num_frames is None:
        most = min(MAX_FRAMES, length) // FRAME_FACTOR * FRAME_FACTOR
        # Rounded, so that frames which were picked before are picked again: length / fps is the same then but for
        # the last digit, and a number half way between two may not go the other way.
        wanted = round(length / fps * wanted_fps, 6)
        num_frames = min(max(wanted, MIN_FRAMES), most)
    num = min(round(num_frames / FRAME_FACTOR) * FRAME_FACTOR, length)
    return torch.linspace(0, length - 1, num).round().long().tolist()


def read_settings(path: str, base: str | None, template: str | None, step: int | None) -> Settings:
    """Read what is small. Raises: RewardError, one line that names the file and the fix."""
    where = "video_reward"
    folder = snapshot(where, os.path.expanduser(path), CHECKPOINT_FILES)
    config = read_json(where, folder / "model_config.json")
    try:
        data, model, peft = config["data_config"], config["model_config"], config.get("peft_lora_config") or {}
        rank, alpha = peft.get("lora_r", 1), peft.get("lora_alpha", 1)
        norm = config.get("inference_config")
        listed = data["eval_dim"]
        dimensions = (listed,) if isinstance(listed, str) else tuple(listed)
        if not model["use_special_tokens"] or len(set(dimensions)) != len(dimensions) or not dimensions:
            raise RewardError(
                f"reward {where}: {folder / 'model_config.json'} describes a model of {listed} "
                f"{'with' if model['use_special_tokens'] else 'without'} special tokens; only models with a special "
                "token for each of some dimensions are known"
            )
        if (positions := model.get("positions", "row")) not in POSITIONS:
            raise RewardError(
                f"reward {where}: {folder / 'model_config.json'}: positions {positions!r} is none of "
                f"{', '.join(POSITIONS)}"
            )
        small = data.get("min_frame_pixels", MIN_PIXELS)
        return Settings(
            folder,
            find_weights(folder, step),
            base or find_base(where, folder, model.get("model_name_or_path")),
            model.get("frozen_weights"),
            dimensions,
            positions,
            read_template(folder, template, data["prompt_template_type"], [TOKEN.format(name) for name in dimensions]),
            # The authors' min_pixels is a constant; other sizes of patch need another.
            Look(data["fps"], data.get("num_frames"), small, data["max_frame_pixels"]),
            model["output_dim"],
            alpha / (math.sqrt(rank) if peft.get("use_rslora") else rank),
            {name: (norm[f"{name}_mean"], norm[f"{name}_std"]) if norm else (0.0, 1.0) for name in dimensions},
        )
    except (KeyError, TypeError) as error:
        raise RewardError(
            f"reward {where}: {folder / 'model_config.json'} is not a VideoReward configuration ({error!r})"
        ) from error


def find_weights(folder: Path, step: int | None) -> Path:
    """The folder checkpoint-<step>, or the one of the highest step."""
    steps = {
        int(path.name.rpartition("-")[2]): path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit()
    }
    found = steps.get(max(steps, default=0) if step is None else step)
    if found is None:
        there = ", ".join(str(number) for number in sorted(steps)) or "none"
        raise RewardError(
            f"reward video_reward: no checkpoint-{'*' if step is None else step} in {folder}; has {there}"
        )
    full = (found / "model.pth").is_file()
    if not full and not all((found / n).is_file() for n in ("adapter_model.safetensors", "non_lora_state_dict.pth")):
        raise RewardError(
            f"reward video_reward: {found} holds neither model.pth nor adapter_model.safetensors with "
            "non_lora_state_dict.pth; copy it again"
        )
    return found


def read_template(folder: Path, path: str | None, kind: str, tokens: Sequence[str]) -> str:
    """The prompt template, checked. Raises: RewardError, one line."""
    file = Path(path) if path else folder / TEMPLATE_FILE
    template = read_prompt("video_reward", file, tokens, "VideoAlign/prompt_template.py")
    known = TEMPLATE_HASHES.get(kind)
    if known and hashlib.sha256(template.encode()).hexdigest() != known:
        raise RewardError(
            f"reward video_reward: {file} is not the template of type {kind} (its sha256 differs); extract it again"
        )
    return template


def read_state(settings: Settings) -> dict[str, Tensor]:
    """All tensors of either layout, under the names that they have there."""
    whole = settings.weights / "model.pth"
    if whole.is_file():
        return read_tensors("video_reward", whole)
    rest = read_tensors("video_reward", settings.weights / "non_lora_state_dict.pth")
    return rest | read_tensors("video_reward", settings.weights / "adapter_model.safetensors")
