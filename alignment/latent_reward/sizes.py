"""How many weights a latent reward trains, from a pipeline's folder without its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
from accelerate import init_empty_weights
from torch import nn

from ..config import ModelConfig
from .blocks import blocks_of, check_layer, width_of
from .head import Head
from .model import Design, trainable_blocks

Shapes = Mapping[str, Sequence[int]]  # layer -> shape of its weight


def count(model: ModelConfig, design: Design, shapes: Mapping[str, Shapes]) -> tuple[int, int, int]:
    """Numbers of trained weights, of frozen ones that a recipe of this kind does not count, and of adapted layers.

    Args:
        model: whose path is a folder.
        shapes: of the weights of each denoiser's layers.
    Raises: UserError for a layer that a denoiser has not, or a LoRA target that matches none of those that run.
    """
    with init_empty_weights():
        denoisers = {component: _skeleton(Path(model.path) / component) for component in shapes}
        for denoiser in denoisers.values():
            check_layer(denoiser, design.layer)
        head = Head(width_of(next(iter(blocks_of(next(iter(denoisers.values()))).values()))), len(design.dimensions))
        blocks = trainable_blocks(denoisers, model, design)
    trained = sum(p.numel() for p in blocks.values())
    adapted = sum("lora_A" in name for name in blocks)
    whole = sum(math.prod(shape) for layers in shapes.values() for shape in layers.values())
    rest = max(whole - trained, 0) if model.trained == "full" else 0  # the others are counted as frozen already
    return trained + sum(p.numel() for p in head.parameters()), rest, adapted


def _skeleton(folder: Path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text("utf-8"))
    return getattr(diffusers, config["_class_name"]).from_config(config)
