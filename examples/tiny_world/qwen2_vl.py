"""A tiny Qwen2-VL that sees the tiny world: what Qwen2-VL is to VideoReward.

One token is two whole frames: all 16 patches of the tower are merged, in a fixed order, since Qwen2-VL knows relative
positions only and could hardly tell otherwise where in a frame a patch was.

    python -m examples.tiny_world.qwen2_vl --out runs/tiny_world/qwen2_vl     # 9 minutes on one CPU core

Training is on fresh clips with flaws (`flaws.py`), right and wrong captions, by `readings.py`.

    B batch, F frames, L tokens, D hidden size
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from tokenizers import Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
)
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

from rewards.qwen2_vl import run
from rewards.qwen2_vl_reader import cut
from rewards.video_reward import rate_indices

from . import models, world
from .flaws import Batch, draw
from .optim import Budget, Muon, Training

FPS = 8.0  # of the world's clips, and of what is looked at: 8 of 9 frames
FRAMES = rate_indices(world.FRAMES, FPS, FPS)
PATCH, TEMPORAL, MERGE = 8, 2, 4
NORMALISATION = Qwen2VLVideoProcessor.image_mean, Qwen2VLVideoProcessor.image_std
TEXT = "look motion prompt {prompt}"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type in ('image', 'video') %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Seen(NamedTuple):
    """What the model makes of a batch."""

    features: Tensor  # (B, video tokens, D) of the vision tower
    tokens: Tensor | None = None  # (B, L) ids
    hidden: tuple[Tensor, ...] = ()  # (B, L, D) before the first layer, and behind each


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; Qwen2-VL's special tokens."""
    words = ["<unk>", "user", "assistant", "look", "motion", "prompt", *world.vocabulary()]
    model = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    model.normalizer = normalizers.Lowercase()
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="<unk>",
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL,
        model_max_length=512,
    )


def processor() -> Qwen2VLProcessor:
    sizes = {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "merge_size": MERGE}
    image = Qwen2VLImageProcessor(**sizes, min_pixels=world.SIZE**2, max_pixels=64 * world.SIZE**2)
    video = Qwen2VLVideoProcessor(**sizes, size={"shortest_edge": world.SIZE**2, "longest_edge": 64 * world.SIZE**2})
    return Qwen2VLProcessor(image, tokenizer(), video, chat_template=CHAT_TEMPLATE)


def configuration() -> Qwen2VLConfig:
    ids = tokenizer()
    text = {
        "vocab_size": len(ids),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 30.0, "mrope_section": [4, 4, 4]},
        "bos_token_id": None,
        "eos_token_id": ids.eos_token_id,
        "pad_token_id": ids.pad_token_id,
    }
    vision = {"depth": 2, "embed_dim": 48, "hidden_size": 96, "num_heads": 4, "mlp_ratio": 2}
    vision |= {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "spatial_merge_size": MERGE}
    special = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    special |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    special = {f"{name}_token_id": ids.convert_tokens_to_ids(token) for name, token in special.items()}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


def build() -> Qwen2VLForConditionalGeneration:
    """1.14M parameters."""
    model = Qwen2VLForConditionalGeneration(configuration())
    for weight in (p for p in model.parameters() if p.ndim > 1):
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5)  # the default, 0.02, is for wider models
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    return model


def attend(
    self: nn.Module, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
) -> Tensor:
    """The tower's attention for frames of one size in one product; transformers takes frame by frame, far slower."""
    num, frames = len(hidden_states), len(cu_seqlens) - 1
    q, k, v = self.qkv(hidden_states).view(num, 3, self.num_heads, -1).unbind(1)
    q, k = apply_rotary_pos_emb_vision(q, k, *position_embeddings)
    q, k, v = (x.view(frames, num // frames, self.num_heads, -1).transpose(1, 2) for x in (q, k, v))
    return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(num, -1))


def see(model: Qwen2VLForConditionalGeneration, ids: PreTrainedTokenizerFast, batch: Batch, text: bool = True) -> Seen:
    """Run the model, or its tower alone, on whole clips and their prompts."""
    pixels = TF.normalize(batch.video[:, FRAMES], *(list(x) for x in NORMALISATION))
    grid = torch.tensor([[len(FRAMES) // TEMPORAL, world.SIZE // PATCH, world.SIZE // PATCH]] * len(batch.video))
    rows = cut(pixels, PATCH, TEMPORAL, MERGE)
    if not text:
        return Seen(model.model.visual(rows, grid_thw=grid).pooler_output.unflatten(0, (len(pixels), -1)))
    pad = "<|video_pad|>"
    head = f"<|im_start|>user\n<|vision_start|>{pad * (len(FRAMES) // TEMPORAL)}<|vision_end|>"
    chats = [head + TEXT.format(prompt=prompt) + "<|im_end|>\n" for prompt in batch.prompts]
    tokens = ids(chats, padding=True, padding_side="right", return_tensors="pt")
    inputs = tokens.input_ids, tokens.attention_mask, rows, grid, ids.convert_tokens_to_ids(pad)
    output, features = run(model.model, *inputs, output_hidden_states=True)
    return Seen(features.unflatten(0, (len(pixels), -1)), tokens.input_ids, output.hidden_states)


def pretrain(folder: Path, budget: Budget, seed: int = 0, batch: int = 32, alone: float = 0.25) -> nn.Module:
    """Train on fresh clips; a `state.pt` in `folder` is continued.

    Args: alone: share of the budget in which the tower learns by itself, cheaply.
    """
    from .readings import Readings

    torch.manual_seed(seed)
    model, ids = build(), tokenizer()
    for block in model.model.visual.blocks:
        block.attn.forward = attend.__get__(block.attn)
    readings = Readings(model.config.text_config.hidden_size, ids)
    matrices = [p for name, p in model.named_parameters() if p.ndim > 1 and "embed_tokens" not in name]
    known = {id(p) for p in matrices}
    rest = [p for p in (*model.parameters(), *readings.parameters()) if id(p) not in known]
    optimisers = [Muon(matrices, lr=0.02, block=100), torch.optim.AdamW(rest, lr=3e-3, weight_decay=0.0)]
    generator = torch.Generator().manual_seed(seed)
    training = Training({"model": model, "readings": readings}, optimisers, budget, folder, generator)
    while not training.done:
        part, text = draw(batch, generator), training.progress >= alone
        seen = see(model, ids, part, text)
        losses = readings.of_frames(seen, part)
        if text:
            losses |= readings.of_clips(model, seen, part)
        training.update(sum(losses.values()))
        if training.step % 50 == 0 or training.done:
            row = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
            print(f"qwen2_vl {training.step} {training.elapsed:.0f}s {row}", flush=True)
        training.save_if_due()
    return model.eval()


def save(folder: Path, model: Qwen2VLForConditionalGeneration) -> None:
    """Write a folder that Qwen2VLForConditionalGeneration.from_pretrained loads, in fp16."""
    model.half().save_pretrained(folder)
    processor().save_pretrained(folder)
    name_tokenizer(folder)


def name_tokenizer(folder: Path) -> None:
    """Give a saved tokenizer the class name that every version of transformers knows; 5.x writes a name of its own."""
    file = Path(folder) / "tokenizer_config.json"
    file.write_text(file.read_text("utf-8").replace("TokenizersBackend", models.TOKENIZER_CLASS), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    save(args.out / "qwen2_vl", pretrain(args.out / "work", Budget(args.steps), args.seed))


if __name__ == "__main__":
    main()
