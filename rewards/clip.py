"""CLIP score of a video: the cosine between its frames and its prompt, through open_clip.

Images are prepared as open_clip's own PIL transform does, but on tensors, so that gradients reach the video.

    F frames of a clip, M frames of all clips of a call, N clips, D embedding, H W pixels
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from rewards.contract import Clip, Reward, RewardError, Scores

MAX_CACHED_PROMPTS = 8192  # 32 MB at D = 1024
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a folder
PRECISIONS = ("fp32", "fp16", "bf16", "pure_fp16", "pure_bf16")
# What open_clip, torch and safetensors raise for files that are missing, damaged, or of another model.
LOAD_ERRORS = (OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, StopIteration)


class Source(NamedTuple):
    """Where a model comes from, as arguments of open_clip.create_model."""

    model: str
    pretrained: str | None
    preprocess: dict[str, Any] | None  # None: open_clip knows it
    quick_gelu: bool
    where: str  # for messages


class CLIPReward(Reward):
    """Mean cosine in [-1, 1] between a clip's frames and its prompt; `dense` holds the cosine of every frame.

    Differentiable in the video. Clips may differ in size and length; `dense` is None where they then have different
    numbers of scored frames. Answers on the device of the first clip's video. A prompt longer than the model's context
    (77 tokens for most) is cut by the tokenizer.

    Args: a checkpoint in one of three ways:
            path: a folder in open_clip's format (open_clip_config.json beside the weights), or "hf-hub:owner/name";
            model, pretrained: an architecture and a published tag of open_clip, downloaded on first use;
            model, path[, pretrained]: a local weights file (.pt, .safetensors, ...); the tag says which published
            weights it holds, and is needed where those of one architecture expect different image preparations.
        frames: frames scored a clip, evenly spaced from first to last (1: the first); None: all.
        device: "cuda" where there is one, else "cpu".
        precision: "fp32", or open_clip's "bf16", "fp16", "pure_bf16", "pure_fp16".
        batch_size: images encoded at once.
    Raises: RewardError for a checkpoint that is missing, damaged or of another architecture.
    Source: CLIPScore (arXiv 2104.08718) without its factor 2.5 and its clipping at 0.
    """

    differentiable = True

    def __init__(
        self,
        model: str | None = None,
        pretrained: str | None = None,
        path: str | None = None,
        *,
        frames: int | None = 8,
        device: str | torch.device | None = None,
        precision: str = "fp32",
        batch_size: int = 64,
        name: str = "clip",
    ):
        source = self.check(model, pretrained, path, frames=frames, precision=precision, batch_size=batch_size)
        self.name, self.frames, self.batch_size = name, frames, batch_size
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model, self.tokenizer, self.preprocess = create(source, precision, self.device)
        low = {"fp16": torch.float16, "bf16": torch.bfloat16}
        self.dtype = low.get(precision.removeprefix("pure_"), torch.float32)
        self.text_cache: dict[str, Tensor] = {}

    @staticmethod
    def check(
        model: str | None = None,
        pretrained: str | None = None,
        path: str | None = None,
        *,
        frames: int | None = 8,
        precision: str = "fp32",
        batch_size: int = 64,
        **_: Any,
    ) -> Source:
        """Validate the options and find the checkpoint without reading weights."""
        if frames is not None and frames < 1:
            raise RewardError(f"reward clip: frames is {frames}, expected a positive number, or None for all")
        if batch_size < 1:
            raise RewardError(f"reward clip: batch_size is {batch_size}, expected a positive number")
        if precision not in PRECISIONS:
            raise RewardError(f"reward clip: precision {precision!r} is not one of {', '.join(PRECISIONS)}")
        return find(model, pretrained, path)

    def indices(self, length: int, fps: float) -> list[int]:
        return frame_indices(length, self.frames)

    def score(self, clips: Sequence[Clip]) -> Scores:
        # A caller's autocast would silently change the precision asked for, and poison the text cache.
        with torch.autocast(self.device.type, enabled=False):
            picked = [clip.video[frame_indices(len(clip.video), self.frames)] for clip in clips]
            lengths = [len(video) for video in picked]
            images = torch.cat([prepare(video.to(self.device), self.preprocess) for video in picked])  # (M, 3, h, w)
            image = torch.cat([self.encode_images(part) for part in images.split(self.batch_size)])  # (M, D)
            text = self.encode_prompts([clip.prompt for clip in clips])  # (N, D)
            cosine = (image * text.repeat_interleave(torch.tensor(lengths, device=self.device), dim=0)).sum(-1)
        cosine = cosine.to(clips[0].video.device).split(lengths)  # N of (F,)
        total = torch.stack([frames.mean() for frames in cosine])
        return Scores(total, dense=torch.stack(cosine) if len(set(lengths)) == 1 else None)

    def encode_images(self, images: Tensor) -> Tensor:
        """(M, 3, h, w) prepared images -> (M, D) unit float32 embeddings."""
        return torch.nn.functional.normalize(self.model.encode_image(images.to(self.dtype)).float(), dim=-1)

    def encode_prompts(self, prompts: Sequence[str]) -> Tensor:
        """N prompts -> (N, D) unit float32 embeddings, each prompt encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self.text_cache]
        for start in range(0, len(new), self.batch_size):
            part = new[start : start + self.batch_size]
            features = self.model.encode_text(self.tokenizer(part).to(self.device)).float()
            self.text_cache |= zip(part, torch.nn.functional.normalize(features, dim=-1), strict=True)
        text = torch.stack([self.text_cache[prompt] for prompt in prompts])
        for oldest in list(self.text_cache)[: max(0, len(self.text_cache) - MAX_CACHED_PROMPTS)]:
            del self.text_cache[oldest]
        return text


def frame_indices(length: int, frames: int | None) -> list[int]:
    """Indices of at most `frames` evenly spaced frames, first and last included; of all for None."""
    if frames is None or frames >= length:
        return list(range(length))
    return torch.linspace(0, length - 1, frames, dtype=torch.float64).round().long().tolist()


def prepare(images: Tensor, config: Mapping[str, Any]) -> Tensor:
    """Resize, crop or pad, and normalise (M, 3, H, W) images in [0, 1] to (M, 3, h, w), as open_clip's transform does.

    PIL resizes in bytes, one axis after the other, and after each clips what the filter overshoots (done here) and
    rounds (not done here, since rounding has no gradient): about one level of 255 at most remains between the two.

    Args:
        config: `preprocess_cfg` of an open_clip model: size, mean, std, interpolation, resize_mode, fill_color.
    """
    size, mode = config["size"], config["resize_mode"]
    target = (size, size) if isinstance(size, int) else tuple(size)
    height, width = _resized_shape(images.shape[-2:], target, mode)
    filter_name = config["interpolation"]
    if mode == "shortest" and target[0] != target[1]:
        filter_name = "bicubic"  # open_clip 3.3 ignores the configuration in this one case
    interpolation = TF.InterpolationMode.BILINEAR if filter_name == "bilinear" else TF.InterpolationMode.BICUBIC
    images = TF.resize(images.float(), [images.shape[-2], width], interpolation, antialias=True).clamp(0, 1)
    images = TF.resize(images, [height, width], interpolation, antialias=True).clamp(0, 1)
    down, across = max(0, target[0] - height), max(0, target[1] - width)
    if down or across:
        padding = [across // 2, down // 2, across - across // 2, down - down // 2]  # left, top, right, bottom
        images = TF.pad(images, padding, fill=config["fill_color"] / 255)
    return TF.normalize(TF.center_crop(images, list(target)), list(config["mean"]), list(config["std"]))


def _resized_shape(shape: Sequence[int], target: tuple[int, int], mode: str) -> tuple[int, int]:
    if mode == "squash":
        return target
    ratios = [have / want for have, want in zip(shape, target, strict=True)]
    if mode == "shortest" and target[0] == target[1]:
        short = min(shape)  # torchvision truncates the longer side, where open_clip's other modes round it
        height, width = (target[0] if side == short else int(target[0] * side / short) for side in shape)
    else:
        ratio = max(ratios) if mode == "longest" else min(ratios)
        height, width = (round(side / ratio) for side in shape)
    return height, width


def find(model: str | None, pretrained: str | None, path: str | None) -> Source:
    """Resolve the three ways to name a checkpoint; see CLIPReward. Raises: RewardError, one line."""
    if path is not None and model is None:
        if pretrained is not None:
            raise RewardError(f"reward clip: pretrained {pretrained!r} without model; {path} says both itself")
        if path.startswith("hf-hub:"):
            return Source(path, None, None, False, path)
        return _find_folder(Path(path.removeprefix("local-dir:")))
    if model is None or (pretrained is None and path is None):
        raise RewardError(
            "reward clip: no checkpoint named; give path (a folder in open_clip's format or hf-hub:owner/name), "
            "or model with pretrained (a published tag) or path (a weights file)"
        )
    return _find_built_in(model, pretrained, path)


def _find_folder(folder: Path) -> Source:
    if folder.is_file():
        raise RewardError(f"reward clip: {folder} is a file, so its architecture must be named: model=ViT-B-32, say")
    config = folder / "open_clip_config.json"
    if not config.is_file():
        raise RewardError(f"reward clip: no {config}; path is a folder that holds it and the weights")
    try:
        complete = {"model_cfg", "preprocess_cfg"} <= json.loads(config.read_text()).keys()
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError) as error:
        raise RewardError(f"reward clip: {config} is not a JSON object; write it again ({error})") from error
    if not complete:
        raise RewardError(f"reward clip: {config} lacks model_cfg or preprocess_cfg; write both (open_clip does)")
    if not any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir()):
        raise RewardError(f"reward clip: no weights ({', '.join(WEIGHT_SUFFIXES)}) in {folder}; copy them there")
    return Source(f"local-dir:{folder}", None, None, False, str(folder))


def _find_built_in(model: str, pretrained: str | None, path: str | None) -> Source:
    from difflib import get_close_matches

    import open_clip
    from open_clip.pretrained import get_pretrained_cfg

    if model not in open_clip.list_models():
        near = ", ".join(get_close_matches(model, open_clip.list_models())) or "see open_clip.list_models()"
        raise RewardError(f"reward clip: open_clip has no model {model!r}; near: {near}")
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is not None and pretrained not in tags:
        hint = "; a weights file is given as path" if Path(pretrained).exists() else ""
        raise RewardError(f"reward clip: {model} has no weights {pretrained!r}; known: {', '.join(tags)}{hint}")
    if path is None:
        quick_gelu = get_pretrained_cfg(model, pretrained).get("quick_gelu", False)
        return Source(model, pretrained, None, quick_gelu, f"{model} {pretrained}")
    if not Path(path).is_file():
        raise RewardError(f"reward clip: no weights file {path}; beside model, path names one")
    # open_clip takes a file's image preparation from nowhere: SigLIP weights would see CLIP's mean and crop.
    keys = ("mean", "std", "interpolation", "resize_mode")
    configs = [get_pretrained_cfg(model, tag) for tag in ([pretrained] if pretrained else tags)]
    preparations = [{key: config[key] for key in keys if config.get(key) is not None} for config in configs]
    if any(preparation != preparations[0] for preparation in preparations):
        raise RewardError(
            f"reward clip: weights of {model} expect different image preparations; say which {path} holds with "
            f"pretrained=, one of {', '.join(tags)}"
        )
    quick_gelu = bool(pretrained) and configs[0].get("quick_gelu", False)
    return Source(model, path, preparations[0] if preparations else None, quick_gelu, path)


def create(source: Source, precision: str, device: torch.device) -> tuple[torch.nn.Module, Any, dict[str, Any]]:
    """Return a frozen open_clip model in evaluation mode, its tokenizer and its `preprocess_cfg`."""
    import open_clip
    from safetensors import SafetensorError

    try:
        with torch.random.fork_rng(devices=[]):  # the weights are drawn, on the CPU, before they are loaded
            model = open_clip.create_model(
                source.model,
                source.pretrained,
                precision=precision,
                device=device,
                force_preprocess_cfg=source.preprocess,
                force_quick_gelu=source.quick_gelu,
                require_pretrained=True,
                weights_only=True,
            )
        tokenizer = open_clip.get_tokenizer(source.model)
    except (*LOAD_ERRORS, pickle.UnpicklingError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RewardError(
            f"reward clip: cannot load {source.where}: {reason} (a half-written file looks like this, and so do the "
            "weights of another architecture: copy or download it again, or correct model)"
        ) from error
    return model.eval().requires_grad_(False), tokenizer, model.visual.preprocess_cfg
