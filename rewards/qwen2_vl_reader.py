"""How Qwen2-VL and its successors read: chats, videos and special tokens, as numbers.

B clips, T frames, L tokens, P patches
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.transforms.functional as TF
from einops import rearrange
from torch import Tensor

from rewards.checkpoints import snapshot
from rewards.contract import RewardError, one_line

MAX_RATIO = 200  # of a frame's sides
TEXT_FILES = ["*.json", "*.txt", "*.jinja"]
PLACEHOLDERS = {"video": "<|video_pad|>", "image": "<|image_pad|>"}
START, END = "<|vision_start|>", "<|vision_end|>"
PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor", "qwen3_vl": "Qwen3VLProcessor"}
POSITIONS = ("row", "native")  # of tokens: 0, 1, 2, ...; or as transformers runs the model by itself


class Patches(NamedTuple):
    """One video or image, cut up for the vision tower."""

    rows: Tensor  # (P, C * temporal patch * patch * patch)
    grid: tuple[int, int, int]  # patches in time, height and width
    seconds: float = 1.0  # from one patch to the next in time, which native positions depend on


class Batch(NamedTuple):
    """What a model is run on: B chats."""

    ids: Tensor  # (B, L), padded on the right
    mask: Tensor  # (B, L)
    rows: Tensor  # (P, patch) of all videos
    grid: Tensor  # (videos, 3)
    pad_id: int  # the token that each merged vision feature takes the place of
    seconds: Tensor | None = None  # (videos,) from one patch to the next in time; None: positions in a row


class Reader:
    """How a Qwen2-VL reads: chats, videos and special tokens, as numbers.

    Args:
        where: name of the reward, for messages.
        base: folder or hub id of the model: configuration, tokenizer, chat template and image preparation count.
        tokens: special tokens to add, in this order.
        positions: of POSITIONS.
    Raises: RewardError, one line.
    """

    def __init__(self, where: str, base: str, tokens: Sequence[str], positions: str = "row"):
        self.where, self.positions = where, positions
        self.config, self.processor = load_base(where, base)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "right"
        self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        self.token_ids = self.tokenizer.convert_tokens_to_ids(list(tokens))

    def check_prompt(self, prompt: str) -> None:
        """Refuse a prompt that holds a special token: it would be read as a token, and shift or forge scores."""
        for token in self.tokenizer.added_tokens_encoder:
            if token in prompt:
                raise RewardError(f"reward {self.where}: a prompt holds the special token {token}: {prompt[:80]!r}")

    def chat(self, kind: str, text: str) -> str:
        """The chat of one user message, a "video" or "image" before its text, up to where an answer would begin."""
        content = [{"type": kind}, {"type": "text", "text": text}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def patches(self, frames: Tensor, seconds: float = 1.0) -> Patches:
        """Cut up frames (T, 3, H, W) in [0, 255] whose sides are multiples of `factor`. Keeps the graph.

        Args: seconds: from one frame to the next.
        """
        processor = self.processor.image_processor
        size, temporal, merge = processor.patch_size, processor.temporal_patch_size, processor.merge_size
        x = TF.normalize(frames / 255, processor.image_mean, processor.image_std)
        if len(x) % temporal:
            x = torch.cat([x, x[-1:].expand(temporal - len(x) % temporal, -1, -1, -1)])
        rows = cut(x[None], size, temporal, merge)
        grid = (len(x) // temporal, x.shape[-2] // size, x.shape[-1] // size)
        return Patches(rows, grid, seconds * temporal)

    @property
    def factor(self) -> int:
        """What the sides of a frame are multiples of."""
        return self.processor.image_processor.patch_size * self.processor.image_processor.merge_size

    def batch(
        self,
        kind: str,
        chats: Sequence[str],
        patches: Sequence[Patches],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Batch:
        """Chats with their videos or images, as a model is run on them."""
        texts = [self._with_placeholders(kind, chat, p) for chat, p in zip(chats, patches, strict=True)]
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(device)
        rows = torch.cat([p.rows for p in patches]).to(device, dtype)
        grid = torch.tensor([p.grid for p in patches], device=device)
        seconds = torch.tensor([p.seconds for p in patches]) if self.positions == "native" else None
        pad_id = self.tokenizer.convert_tokens_to_ids(PLACEHOLDERS[kind])
        return Batch(tokens.input_ids, tokens.attention_mask, rows, grid, pad_id, seconds)

    def _with_placeholders(self, kind: str, chat: str, patches: Patches) -> str:
        """The chat with a placeholder for each merged feature."""
        processor, pad = self.processor.image_processor, PLACEHOLDERS[kind]
        steps, height, width = patches.grid
        each = pad * (height * width // processor.merge_size**2)
        if self.positions == "row" or self.config.model_type != "qwen3_vl":
            return chat.replace(pad, each * steps)
        middle = (1 - 1 / processor.temporal_patch_size) / 2  # of the frames that make a step
        times = [patches.seconds * (step + middle) for step in range(steps)]
        return chat.replace(f"{START}{pad}{END}", "".join(f"<{time:.1f} seconds>{START}{each}{END}" for time in times))


def cut(videos: Tensor, patch: int, temporal: int, merge: int) -> Tensor:
    """Normalised pixels (B, T, 3, H, W) as rows (P, 3 * temporal * patch * patch), those that are merged together."""
    return rearrange(
        videos,
        "b (t p) c (h m y) (w n x) -> (b t h w m n) (c p y x)",
        p=temporal,
        m=merge,
        n=merge,
        y=patch,
        x=patch,
    )


def resized(frames: Tensor, height: int, width: int) -> Tensor:
    """Resize (T, 3, H, W) in [0, 1] to bytes in [0, 255], as float; the authors resize bytes, so results are rounded.

    Where the frames carry a graph, the gradient is that of the same resizing without the rounding.
    """
    as_bytes = (frames.detach().float().clamp(0, 1) * 255).round().byte()
    bytes_ = TF.resize(as_bytes, [height, width], TF.InterpolationMode.BICUBIC, antialias=True).float()
    if not frames.requires_grad:
        return bytes_
    smooth = TF.resize(frames.float() * 255, [height, width], TF.InterpolationMode.BICUBIC, antialias=True)
    return smooth + (bytes_ - smooth).detach()


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Sides that are multiples of `factor`, about the same ratio, within the bounds on pixels (Qwen2-VL's rule).

    Raises: ValueError for a ratio above 200.
    """
    if max(height, width) > MAX_RATIO * min(height, width):
        raise ValueError(f"a frame of {height} x {width} is longer than {MAX_RATIO} times its width")
    new_height, new_width = (max(factor, round(side / factor) * factor) for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height, new_width = (max(factor, math.floor(s / shrink / factor) * factor) for s in (height, width))
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return new_height, new_width


def read_prompt(where: str, file: Path, tokens: Sequence[str], origin: str) -> str:
    """A prompt template with `tokens` in this order and {text_prompt}, once each.

    Args: origin: the authors' file that holds it, for the message.
    Raises: RewardError, one line.
    """
    if not file.is_file():
        raise RewardError(
            f"reward {where}: no {file}; the prompt is part of the checkpoint's format: write it with "
            f"python -m rewards.extract_template PATH/TO/{origin} --out {file}"
        )
    try:
        template = file.read_bytes().decode("utf-8")
    except ValueError as error:
        raise RewardError(f"reward {where}: {file} is not UTF-8 text; extract it again") from error
    places = [template.find(token) for token in tokens]
    if any(template.count(token) != 1 for token in tokens) or places != sorted(places):
        raise RewardError(f"reward {where}: {file} must hold {', '.join(tokens)} once each, in this order")
    if template.count("{text_prompt}") != 1:
        raise RewardError(f"reward {where}: {file} must hold {{text_prompt}} once")
    return template


def load_base(where: str, base: str) -> tuple[Any, Any]:
    """Configuration and processor of a Qwen2-VL or a successor. Raises: RewardError, one line."""
    import transformers

    folder = snapshot(where, base, TEXT_FILES)
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        name = PROCESSORS.get(config.model_type, "Qwen2VLProcessor")
        processor = getattr(transformers, name).from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = one_line(error)
        raise RewardError(f"reward {where}: base {base} is not a whole Qwen2-VL folder ({reason})") from error
    if config.model_type not in PROCESSORS:
        raise RewardError(
            f"reward {where}: base {base} is a {config.model_type}, expected one of {', '.join(PROCESSORS)}"
        )
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise RewardError(f"reward {where}: base {base} has no chat template (chat_template.json or .jinja)")
    return config, processor
