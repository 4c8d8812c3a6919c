"""Reward models on Qwen2-VL, run as their authors trained them: what VideoReward and HPSv3 share.

Both read a chat of one video or image and a text, and put a small head on the last hidden states of some tokens. Two
things differ from Qwen2-VL as transformers runs it, and both would change scores silently:

- positions are one-dimensional, 0, 1, 2, ..., in all three sections of the rotary embedding: the authors' forward pass
  hands embeddings to the language model, which transformers 4.45, that they trained with, then numbers in a row;
- vision features are the merged ones (`pooler_output` in transformers 5), one a placeholder token.

    B clips, T frames, L tokens, P patches, D hidden size, K special tokens
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision.transforms.functional as TF
from einops import rearrange
from torch import Tensor, nn

from rewards.checkpoints import merge_lora, plain_names, read_json, read_tensors, snapshot
from rewards.contract import RewardError, one_line

MAX_RATIO = 200  # of a frame's sides
TEXT_FILES = ["*.json", "*.txt", "*.jinja"]
PLACEHOLDERS = {"video": "<|video_pad|>", "image": "<|image_pad|>"}
TEMPLATE_FILE = "prompt_template.txt"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EMBEDDING = "language_model.embed_tokens.weight"


class Patches(NamedTuple):
    """One video or image, cut up for the vision tower."""

    rows: Tensor  # (P, C * temporal patch * patch * patch)
    grid: tuple[int, int, int]  # patches in time, height and width


class Qwen2VLReward:
    """Qwen2-VL without its language head, with a head of one's own in float32.

    Args:
        where: name of the reward, for messages.
        base: folder or hub id of the Qwen2-VL that was tuned: configuration, tokenizer, chat template and image
            preparation are taken from it, and weights only where `state` lacks some.
        state: the tuned weights under the names of Qwen2-VL or those of peft; the head's are called rm_head.
        head: makes the head, given the hidden size.
        tokens: the special tokens that the authors added, in the order in which they added them.
        lora_scale: factor of LoRA products, which are merged.
    Raises: RewardError, one line, for parts that are missing or do not fit.
    """

    def __init__(
        self,
        where: str,
        base: str,
        state: dict[str, Tensor],
        head: Callable[[int], nn.Module],
        tokens: Sequence[str],
        *,
        lora_scale: float = 1.0,
        device: torch.device,
        dtype: torch.dtype,
    ):
        from accelerate import init_empty_weights
        from transformers import Qwen2VLModel

        self.where, self.device, self.dtype = where, device, dtype
        config, self.processor = load_base(where, base)
        self.tokenizer = self.processor.tokenizer
        self.tokenizer.padding_side = "right"
        self.tokenizer.add_tokens(list(tokens), special_tokens=True)
        self.token_ids = self.tokenizer.convert_tokens_to_ids(list(tokens))
        state = plain_names(state)
        if EMBEDDING not in state:
            raise RewardError(f"reward {where}: the checkpoint holds no token embeddings; it is cut")
        config.text_config.vocab_size = len(state[EMBEDDING])
        self._check_vocabulary(state, config.tie_word_embeddings)
        with init_empty_weights():
            self.model = Qwen2VLModel(config)
        self.head = head(config.text_config.hidden_size)
        if missing := self.model.state_dict().keys() - state.keys():
            whole = base_weights(where, base)
            state |= {name: whole[name] for name in missing if name in whole}
        state = merge_lora(where, state, lora_scale)
        self._fill(self.model, {n: t for n, t in state.items() if not n.startswith(("rm_head.", "lm_head."))})
        self._fill(self.head, {n[len("rm_head.") :]: t for n, t in state.items() if n.startswith("rm_head.")})
        # Buffers too: the authors' call of model.to(bfloat16) rounds the frequencies of positions, in training as well.
        self.model.to(device, dtype).eval().requires_grad_(False)
        self.head.to(device, torch.float32).eval().requires_grad_(False)

    def _check_vocabulary(self, state: dict[str, Tensor], tied: bool) -> None:
        embedding, head = state[EMBEDDING], state.get("lm_head.weight")
        if tied and head is not None and not torch.equal(embedding, head):
            raise RewardError(
                f"reward {self.where}: embed_tokens and lm_head differ in the checkpoint though the base model ties "
                "them; it was put together wrongly"
            )
        if max(self.token_ids) >= len(embedding):
            raise RewardError(
                f"reward {self.where}: token {max(self.token_ids)} of the tokenizer is beyond the {len(embedding)} of "
                "the checkpoint; base is not the model that was tuned"
            )

    def _fill(self, module: nn.Module, state: dict[str, Tensor]) -> None:
        """Load strictly, in one line where that fails."""
        wanted = module.state_dict()
        missing, unknown = wanted.keys() - state.keys(), state.keys() - wanted.keys()
        wrong = [name for name in wanted.keys() & state.keys() if wanted[name].shape != state[name].shape]
        for what, names in (("lacks", missing), ("holds the unknown", unknown), ("has another size of", wrong)):
            if names:
                example, more = sorted(names)[0], f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise RewardError(
                    f"reward {self.where}: the checkpoint {what} {example}{more}; it is cut, or base is another model"
                )
        module.load_state_dict(state, assign=True)

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

    def patches(self, frames: Tensor) -> Patches:
        """Cut up frames (T, 3, H, W) in [0, 255] whose sides are multiples of `factor`. Keeps the graph."""
        processor = self.processor.image_processor
        size, temporal, merge = processor.patch_size, processor.temporal_patch_size, processor.merge_size
        x = TF.normalize(frames / 255, processor.image_mean, processor.image_std)
        if len(x) % temporal:
            x = torch.cat([x, x[-1:].expand(temporal - len(x) % temporal, -1, -1, -1)])
        rows = cut(x[None], size, temporal, merge)
        return Patches(rows, (len(x) // temporal, x.shape[-2] // size, x.shape[-1] // size))

    @property
    def factor(self) -> int:
        """What the sides of a frame are multiples of."""
        return self.processor.image_processor.patch_size * self.processor.image_processor.merge_size

    def scores(self, kind: str, chats: Sequence[str], patches: Sequence[Patches]) -> Tensor:
        """(B, K, head's outputs) at the special tokens of B chats, in the order in which they stand there."""
        merge = self.processor.image_processor.merge_size**2
        pad = PLACEHOLDERS[kind]
        texts = [chat.replace(pad, pad * (math.prod(p.grid) // merge)) for chat, p in zip(chats, patches, strict=True)]
        batch = self.tokenizer(texts, padding=True, return_tensors="pt").to(self.device)
        ids, mask = batch.input_ids, batch.attention_mask
        rows = torch.cat([p.rows for p in patches]).to(self.device, self.dtype)
        grid = torch.tensor([p.grid for p in patches], device=self.device)
        pad_id = self.tokenizer.convert_tokens_to_ids(pad)
        hidden = run(self.model, ids, mask, rows, grid, pad_id)[0].last_hidden_state
        at = torch.isin(ids, torch.tensor(self.token_ids, device=self.device))
        return self.head(hidden[at].float()).view(len(ids), len(self.token_ids), -1)


def run(
    model: nn.Module, ids: Tensor, mask: Tensor, rows: Tensor, grid: Tensor, pad_id: int, **options: Any
) -> tuple[Any, Tensor]:
    """Run a Qwen2VLModel on B chats as its reward models are trained.

    Args:
        ids, mask: (B, L), padded on the right.
        rows, grid: (P, patch) pixels and (videos, 3) patches in time, height and width; see `cut`.
        pad_id: the token that each merged vision feature takes the place of.
        options: of the language model, such as output_hidden_states.
    Returns: the language model's output, and the vision features (placeholders, D).
    """
    embeds = model.language_model.embed_tokens(ids)
    features = model.visual(rows, grid_thw=grid).pooler_output
    embeds = embeds.masked_scatter((ids == pad_id)[..., None], features.to(embeds.dtype))
    positions = torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    output = model.language_model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False, **options
    )
    return output, features


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


def find_base(where: str, folder: Path, named: str | None) -> str:
    """The base model of a checkpoint: its folder, one inside, or the folder or hub id that its configuration names."""
    inside = [path.parent for path in [*folder.glob("config.json"), *sorted(folder.glob("*/config.json"))]]
    candidates = [path for path in inside if read_json(where, path / "config.json").get("model_type") == "qwen2_vl"]
    if candidates:
        return str(candidates[0])
    if named and (folder / named).is_dir():
        return str(folder / named)
    if not named:
        raise RewardError(f"reward {where}: {folder} does not say which Qwen2-VL was tuned; give base=folder or hub id")
    return named


def load_base(where: str, base: str) -> tuple[Any, Any]:
    """Configuration and processor of a Qwen2-VL. Raises: RewardError, one line."""
    from transformers import AutoConfig, Qwen2VLProcessor

    folder = snapshot(where, base, TEXT_FILES)
    try:
        config = AutoConfig.from_pretrained(folder)
        processor = Qwen2VLProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = one_line(error)
        raise RewardError(f"reward {where}: base {base} is not a whole Qwen2-VL folder ({reason})") from error
    if config.model_type != "qwen2_vl":
        raise RewardError(f"reward {where}: base {base} is a {config.model_type}, expected a qwen2_vl")
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise RewardError(f"reward {where}: base {base} has no chat template (chat_template.json or .jinja)")
    return config, processor


def base_weights(where: str, base: str) -> dict[str, Tensor]:
    """All weights of the base model, under the names of Qwen2VLModel."""
    folder = snapshot(where, base, [*TEXT_FILES, "*.safetensors"])
    state: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= read_tensors(where, file)
    return plain_names(state)
