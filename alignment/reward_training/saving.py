"""The folder of a trained reward model, in the layout of VideoReward's release.

    model_config.json           dimensions, frames, adapters, and the mean and deviation of each score
    prompt_template.txt
    base/                       configuration, tokenizer and processor of the model that was tuned
    checkpoint-<iteration>/     adapter_model.safetensors (LoRA) and non_lora_state_dict.pth (vision tower, embedding,
                                head); or model.pth, where all weights were trained

Tensors have the names of transformers 4.45, by which the authors' own code reads them as well.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from rewards.checkpoints import PREFIX, is_hub_id
from rewards.qwen2_vl import EMBEDDING, TEMPLATE_FILE

from ..files import replacing_folder
from .network import TokenEmbedding

if TYPE_CHECKING:
    from .model import Description, RewardModel

RELEASED = (("language_model.", "model."),)  # names of Qwen2VLModel, and what they begin with in the release


def save_reward(model: RewardModel, described: Description, folder: Path) -> Path:
    """Write the folder; it appears whole or not at all."""
    with replacing_folder(folder) as new:
        (new / "model_config.json").write_text(json.dumps(model_config(model, described), indent=2) + "\n", "utf-8")
        (new / TEMPLATE_FILE).write_bytes(model.template.encode())
        model.reader.processor.save_pretrained(new / "base")
        model.reader.config.save_pretrained(new / "base")
        step = new / f"checkpoint-{described.step}"
        step.mkdir()
        adapters, rest = trained_state(model)
        if adapters:
            save_file(adapters, step / "adapter_model.safetensors")
        torch.save(rest, step / ("non_lora_state_dict.pth" if adapters else "model.pth"))
    return folder


def trained_state(model: RewardModel) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Adapters, and all else that the base does not have; without adapters, that is the whole model."""
    state = model.core.state_dict()
    whole = model.recipe.model.trained == "full"
    adapters = {_released(n).replace(".default.", "."): t for n, t in state.items() if "lora_" in n}
    kept = state if whole else {n: t for n, t in state.items() if n in model.parameters and "lora_" not in n}
    rest = {n: t for n, t in kept.items() if "embed_tokens" not in n}
    embedding = model.core.language_model.embed_tokens
    rest[EMBEDDING] = embedding.whole() if isinstance(embedding, TokenEmbedding) else embedding.weight
    rest["rm_head.weight"] = model.head.weight
    return _plain(adapters), _plain({_released(name): tensor for name, tensor in rest.items()})


def model_config(model: RewardModel, described: Description) -> dict[str, Any]:
    """What model_config.json holds, in the release's own words where it has some."""
    config, recipe = model.config, model.recipe
    path = recipe.model.path if is_hub_id(recipe.model.path) else str(Path(recipe.model.path).resolve())
    tuned = recipe.model.trained == "lora"
    norm = {}
    for name, (mean, std) in described.norm.items():
        norm |= {f"{name}_mean": round(mean, 6), f"{name}_std": round(std, 6)}
    lora = {"lora_enable": tuned, "vision_lora": False, "use_rslora": False}
    if tuned:
        lora |= {"lora_r": recipe.model.lora.rank, "lora_alpha": recipe.model.lora.alpha}
        lora |= {"lora_dropout": config.lora_dropout}
    return {
        "data_config": {
            "max_frame_pixels": config.max_pixels,
            "min_frame_pixels": config.min_pixels,
            "num_frames": config.num_frames,
            "fps": config.fps,
            "eval_dim": list(config.dimensions),
            "prompt_template_type": "own",
            "sample_type": "uniform",
        },
        "model_config": {
            "model_name_or_path": path,
            "frozen_weights": path if tuned else None,
            "output_dim": 1,
            "use_special_tokens": True,
            "reward_token": "special",
            "loss_type": {"regression": "reg"}.get(config.loss, config.loss),
            "torch_dtype": recipe.model.dtype,
            "positions": model.reader.positions,
        },
        "peft_lora_config": lora,
        "inference_config": norm,
    }


def _released(name: str) -> str:
    for ours, theirs in RELEASED:
        name = theirs + name.removeprefix(ours) if name.startswith(ours) else name
    return PREFIX + name


def _plain(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
