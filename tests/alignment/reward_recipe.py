"""A reward model to train in seconds: a tiny Qwen2-VL of random weights, and pairs that anyone can tell apart."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import yaml

from tests.rewards.qwen2_vl_twin import REWARD_TOKENS, Twin, linear, save_base

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
