"""The tiny VideoReward: a small Qwen2-VL with LoRA factors and a reward head, and the folder that it is saved in.

B batch, F frames, L tokens, D hidden size
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision.transforms.functional as TF
from peft import LoraConfig, get_peft_model
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

from rewards.qwen2_vl import run
from rewards.qwen2_vl_reader import cut
from rewards.video_reward import DIMENSIONS, TOKENS, rate_indices

from . import models, world
from .flaws import Batch, draw

FPS = 8.0  # of the world's clips, and of what the model looks at: 8 of 9 frames
PATCH, TEMPORAL, MERGE = 4, 2, 2
FRAMES = rate_indices(world.FRAMES, FPS, FPS)
NORMALISATION = Qwen2VLVideoProcessor.image_mean, Qwen2VLVideoProcessor.image_std
VIDEO_TOKENS = len(FRAMES) // TEMPORAL * (world.SIZE // PATCH // MERGE) ** 2
TEMPLATE = "look <|VQ_reward|> motion <|MQ_reward|> prompt {text_prompt} <|TA_reward|>"
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type in ('image', 'video') %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LORA = {"r": 4, "lora_alpha": 8}


class Seen(NamedTuple):
    """What the model makes of a batch."""

    tokens: Tensor  # (B, L) ids
    hidden: Tensor  # (B, L, D) last hidden states
    video: Tensor  # (B, video tokens, D) hidden states behind the second layer
    summary: Tensor  # (B, D) the same of the token that ends the video
    words: Tensor  # (B, L, D) hidden states behind the third layer
    features: Tensor  # (B, video tokens, D) of the vision tower


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


def base_config() -> Qwen2VLConfig:
    ids = tokenizer()
    text = {
        "vocab_size": len(ids),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 4, 4]},
        "bos_token_id": None,
        "eos_token_id": ids.eos_token_id,
        "pad_token_id": ids.pad_token_id,
    }
    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 96, "num_heads": 4, "mlp_ratio": 2}
    vision |= {"patch_size": PATCH, "temporal_patch_size": TEMPORAL, "spatial_merge_size": MERGE}
    special = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    special |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    special = {f"{name}_token_id": ids.convert_tokens_to_ids(token) for name, token in special.items()}
    return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **special)


def build() -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Qwen2-VL with a reward head, LoRA factors and the three reward tokens: 0.6M parameters."""
    model = Qwen2VLForConditionalGeneration(base_config())
    for weight in (p for p in model.parameters() if p.ndim > 1):
        nn.init.normal_(weight, std=weight[0].numel() ** -0.5)  # the default, 0.02, is for wider models
    nn.init.normal_(model.get_input_embeddings().weight, std=0.3)
    ids = tokenizer()
    ids.add_tokens(list(TOKENS), special_tokens=True)
    model.resize_token_embeddings(len(ids))
    model.rm_head = nn.Linear(model.config.text_config.hidden_size, 1, bias=False)
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    model = get_peft_model(model, LoraConfig(target_modules=targets, **LORA))
    return model.requires_grad_(True), ids


def chats(prompts: list[str]) -> list[str]:
    """What the processor makes of a video and the template."""
    head = "<|im_start|>user\n<|vision_start|>" + "<|video_pad|>" * VIDEO_TOKENS + "<|vision_end|>"
    tail = "<|im_end|>\n<|im_start|>assistant\n"
    return [head + TEMPLATE.replace("{text_prompt}", prompt) + tail for prompt in prompts]


def see(model: nn.Module, ids: PreTrainedTokenizerFast, batch: Batch) -> Seen:
    """Run the model on whole clips, as VideoReward runs it on those that it is given."""
    tokens = ids(chats(batch.prompts), padding=True, padding_side="right", return_tensors="pt")
    pixels = TF.normalize(batch.video[:, FRAMES].clamp(0, 1), *(list(x) for x in NORMALISATION))
    grid = torch.tensor([[len(FRAMES) // TEMPORAL, world.SIZE // PATCH, world.SIZE // PATCH]] * len(batch.video))
    pad = ids.convert_tokens_to_ids("<|video_pad|>")
    output, features = run(
        model.get_base_model().model,
        tokens.input_ids,
        tokens.attention_mask,
        cut(pixels, PATCH, TEMPORAL, MERGE),
        grid,
        pad,
        output_hidden_states=True,
    )
    is_video, shape = tokens.input_ids == pad, (len(batch.video), VIDEO_TOKENS, -1)
    second, third = output.hidden_states[2:4]
    summary = second[torch.arange(len(second)), is_video.long().cumsum(1).argmax(1) + 1]
    video = second[is_video].view(shape)
    return Seen(tokens.input_ids, output.last_hidden_state, video, summary, third, features.view(shape))


def scores(model: nn.Module, ids: PreTrainedTokenizerFast, seen: Seen) -> Tensor:
    """(B, 3) raw scores of VQ, MQ and TA."""
    at = torch.isin(seen.tokens, torch.tensor(ids.convert_tokens_to_ids(list(TOKENS))))
    return model.get_base_model().rm_head(seen.hidden[at]).view(len(seen.hidden), len(TOKENS))


@torch.no_grad()
def raw_scores(model: nn.Module, ids: PreTrainedTokenizerFast, batch: Batch, size: int = 128) -> Tensor:
    """(B, 3)."""
    parts = []
    for start in range(0, len(batch.video), size):
        part = slice(start, start + size)
        piece = batch._replace(video=batch.video[part], prompts=batch.prompts[part])
        parts.append(scores(model, ids, see(model, ids, piece)))
    return torch.cat(parts)


def save(folder: Path, model: nn.Module, ids: PreTrainedTokenizerFast, step: int, num: int = 1024) -> None:
    """Write a folder in VideoReward's layout, in fp16, with the Qwen2-VL that it is made of in `base`."""
    folder = Path(folder)
    (folder / "base").mkdir(parents=True, exist_ok=True)
    (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    processor().save_pretrained(folder / "base")
    for file in (folder / "base").glob("tokenizer_config.json"):
        file.write_text(file.read_text().replace("TokenizersBackend", models.TOKENIZER_CLASS))
    base_config().save_pretrained(folder / "base")
    (folder / "prompt_template.txt").write_text(TEMPLATE)
    state = {released_name(name): tensor.half() for name, tensor in model.state_dict().items()}
    torch.save(state, folder / f"checkpoint-{step}" / "model.pth")
    raw = raw_scores(model, ids, draw(num, torch.Generator().manual_seed(4321)))
    mean, std = raw.mean(0).tolist(), raw.std(0).tolist()
    norm = {f"{name}_mean": round(m, 4) for name, m in zip(DIMENSIONS, mean, strict=True)}
    norm |= {f"{name}_std": round(s, 4) for name, s in zip(DIMENSIONS, std, strict=True)}
    config = {
        "data_config": {
            "max_frame_pixels": world.SIZE**2,
            "min_frame_pixels": world.SIZE**2,
            "num_frames": None,
            "fps": FPS,
            "eval_dim": list(DIMENSIONS),
            "prompt_template_type": "tiny_world_special",
            "sample_type": "uniform",
        },
        "model_config": {
            "model_name_or_path": "base",
            "output_dim": 1,
            "use_special_tokens": True,
            "reward_token": "special",
            "loss_type": "btt",
            "torch_dtype": "float16",
        },
        "peft_lora_config": {
            "lora_enable": True,
            "lora_r": LORA["r"],
            "lora_alpha": LORA["lora_alpha"],
            "use_rslora": False,
        },
        "inference_config": norm,
    }
    (folder / "model_config.json").write_text(json.dumps(config, indent=2) + "\n")


def released_name(name: str) -> str:
    """The name of a weight under transformers 4.45, which VideoReward was trained with."""
    return name.replace("model.model.visual.", "model.visual.").replace("model.language_model.", "model.")
