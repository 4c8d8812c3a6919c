"""Checkpoints of the published sizes with random weights, for measuring speed and memory where none can be had."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

QWEN2_VL_2B = {  # Qwen/Qwen2-VL-2B-Instruct, config.json
    "text_config": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
        "vocab_size": 151660,
    },
    "vision_config": {
        "depth": 32,
        "embed_dim": 1280,
        "hidden_size": 1536,
        "num_heads": 16,
        "mlp_ratio": 4,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "tie_word_embeddings": True,
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type in ('image', 'video') %}<|vision_start|><|{{ part.type }}_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
WORDS = 880  # of the template: about as many tokens as the published one has


def video_reward(folder: Path, config: dict[str, Any] = QWEN2_VL_2B) -> dict[str, Any]:
    """Options of a VideoReward on Qwen2-VL-2B, its LoRA merged, in bfloat16."""
    from accelerate import init_empty_weights
    from transformers import Qwen2VLConfig, Qwen2VLImageProcessor, Qwen2VLModel, Qwen2VLProcessor, Qwen2VLVideoProcessor

    folder = folder / "video_reward"
    step = folder / "checkpoint-1"
    step.mkdir(parents=True)
    tokenizer = _word_tokenizer()
    Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor(), chat_template=CHAT).save_pretrained(
        folder / "base"
    )
    base = Qwen2VLConfig(**config)
    base.save_pretrained(folder / "base")
    with init_empty_weights():
        model = Qwen2VLModel(base)
    state = {f"model.{name}": tensor for name, tensor in _random(model).items()}
    hidden = base.text_config.hidden_size
    state["rm_head.weight"] = torch.randn(1, hidden) * hidden**-0.5
    torch.save(state, step / "model.pth")
    places = "<|VQ_reward|> <|MQ_reward|> {text_prompt} <|TA_reward|>"
    (folder / "prompt_template.txt").write_text("word " * WORDS + places)
    settings = {
        "data_config": {
            "eval_dim": ["VQ", "MQ", "TA"],
            "fps": 2.0,
            "num_frames": None,
            "max_frame_pixels": 200704,
            "prompt_template_type": "random",
        },
        "model_config": {"use_special_tokens": True, "output_dim": 1, "model_name_or_path": "base"},
    }
    (folder / "model_config.json").write_text(json.dumps(settings))
    return {"path": str(folder)}


def hpsv2(folder: Path) -> dict[str, Any]:
    """Options of an HPSv2 on open_clip's ViT-H-14."""
    import open_clip

    with torch.random.fork_rng(devices=[]):
        model = open_clip.create_model("ViT-H-14", precision="fp16")
    torch.save({"state_dict": model.state_dict()}, folder / "HPS_random.pt")
    return {"path": str(folder / "HPS_random.pt"), "precision": "fp16" if torch.cuda.is_available() else "fp32"}


TRUE_SIZES: dict[str, Callable[[Path], dict[str, Any]]] = {"hpsv2": hpsv2, "video_reward": video_reward}


def _random(model: torch.nn.Module) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)

    def drawn(shape: torch.Size) -> Tensor:
        if len(shape) < 2:
            return torch.ones(shape, dtype=torch.bfloat16)
        scale = shape[1:].numel() ** -0.5
        return (torch.rand(shape, generator=draw) * 2 - 1).mul_(scale).bfloat16()

    return {name: drawn(tensor.shape) for name, tensor in model.state_dict().items()}


def _word_tokenizer():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    model = Tokenizer(WordLevel({"<unk>": 0, "word": 1}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<|endoftext|>", "additional_special_tokens": SPECIAL}
    return PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", **special)
