"""A reward model to train in seconds: a tiny Qwen2-VL of random weights, and pairs that anyone can tell apart."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import yaml

from tests.rewards.qwen2_vl_twin import (
    CHAT_TEMPLATE,
    REWARD_TOKENS,
    SIZES,
    Twin,
    config,
    linear,
    save_base,
    tokenizer,
)

PROMPTS = ["a red circle", "b"]
LEVELS = [30, 220, 90, 160]  # brightness of the clips, each with some noise


def write_clips(folder: Path) -> list[Path]:
    """Four clips of 16 x 16 pixels and 4 frames at 4 a second, from dark to bright and in no order."""
    draw = np.random.default_rng(0)
    files = []
    for number, level in enumerate(LEVELS):
        frames = level + draw.integers(-20, 20, (4, 16, 16, 3))
        files.append(folder / f"{number}.mp4")
        iio.imwrite(files[-1], frames.clip(0, 255).astype(np.uint8), fps=4, codec="libx264", macro_block_size=2)
    return files


def rows(pairs=((0, 1), (1, 2), (3, 0), (2, 3)), **more) -> list[dict]:
    """Pairs in which the brighter clip has the better VQ, the darker one the better MQ; TA is not labelled."""
    found = []
    for number, (a, b) in enumerate(pairs):
        sign = 1 if LEVELS[a] > LEVELS[b] else -1
        clips = {"a": {"video": f"{a}.mp4"}, "b": {"video": f"{b}.mp4"}}
        scores = {"VQ": [LEVELS[a] / 100, LEVELS[b] / 100], "MQ": [-LEVELS[a] / 100, -LEVELS[b] / 100]}
        row = {"id": str(number), "prompt": PROMPTS[number % 2], **clips, "labels": {"VQ": sign, "MQ": -sign}}
        found.append({**row, "label": sign, "scores": scores, "annotator": "human", **more})
    return found


def write_rows(path: Path, some: list[dict]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in some), "utf-8")
    return path


def write_recipe(folder: Path, base: Path, preferences: Path, **algorithm) -> Path:
    """A recipe that trains for two iterations."""
    recipe = {
        "name": "tiny",
        "output": str(folder / "run"),
        "iterations": 2,
        "model": {"path": str(base), "device": "cpu", "lora": {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}},
        "algorithm": {
            **{"name": "reward_model", "dimensions": ["VQ", "MQ"], "batch_size": 2, "min_pixels": 256},
            **{"max_pixels": 256, "workers": 1, "lora_dropout": 0.1, **algorithm},
        },
        "data": {"preferences": str(preferences), "held_out": str(preferences)},
        "optimizer": {"lr": 1e-3, "weight_decay": 0.0},
        "tracker": None,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe), "utf-8")
    return path


def save_tiny_base(folder: Path) -> Path:
    save_base(folder, Twin(REWARD_TOKENS, linear(1)))
    return folder


def save_successor(folder: Path, family: str):
    """Qwen2.5-VL or Qwen3-VL of random weights, with the tokenizer of the Qwen2-VL twin; returns the model."""
    import transformers

    twin = config()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "rope_parameters", "pad_token_id")
    text = {name: twin.text_config.to_dict()[name] for name in names} | {"bos_token_id": None, "eos_token_id": None}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    special = {name: getattr(twin, name) for name in names}
    vision = {"depth": 2, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    vision |= {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    if family == "qwen2_5_vl":
        name, videos, norm = "Qwen2_5_VL", "Qwen2VL", {}
        vision |= {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 2}
    else:
        name, videos, norm = "Qwen3VL", "Qwen3VL", {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        text |= {"head_dim": 8}
        vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    model = getattr(transformers, f"{name}ForConditionalGeneration")(
        getattr(transformers, f"{name}Config")(text_config=text, vision_config=vision, **special)
    )
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.25, generator=draw)
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 64, "longest_edge": 1 << 20}, **SIZES}
    image = transformers.Qwen2VLImageProcessor(**size, **norm)
    video = getattr(transformers, f"{videos}VideoProcessor")(**size)
    processor = getattr(transformers, f"{name}Processor")
    processor(image, tokenizer(), video, chat_template=CHAT_TEMPLATE).save_pretrained(folder)
    return model.eval()
