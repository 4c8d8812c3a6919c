"""Low-rank adapters (LoRA, arXiv 2106.09685) on a pipeline's denoisers, through peft as diffusers does it."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from torch import nn

from .config import LoRAConfig
from .errors import UserError

LAYERS = (nn.Linear, nn.Conv2d, nn.Conv3d)


def add_lora(denoisers: dict[str, nn.Module], config: LoRAConfig) -> dict[str, nn.Parameter]:
    """Add adapters that begin without effect; returns their weights by name, float32 whatever the rest is.

    Raises: UserError where a target matches no layer.
    """
    options = {"r": config.rank, "lora_alpha": config.alpha, "target_modules": list(config.targets)}
    parameters = {}
    for component, denoiser in denoisers.items():
        check_targets(component, [n for n, m in denoiser.named_modules() if isinstance(m, LAYERS)], config.targets)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # every process starts from the same adapters, whatever ran in it before
            denoiser.add_adapter(PeftLoraConfig(**options, init_lora_weights=True))
        for name, p in denoiser.named_parameters():
            if "lora_" in name:
                p.data = p.data.float()
                p.requires_grad_(True)
                parameters[f"{component}.{name}"] = p
    return parameters


def save_lora(pipe: Any, denoisers: dict[str, nn.Module], folder: Path) -> None:
    """Write adapters as the pipeline's own load_lora_weights takes them: pytorch_lora_weights.safetensors.

    A second expert goes to a folder of its own inside (load_lora_weights(..., load_into_transformer_2=True)); a
    pipeline without LoRA loading gets one folder a denoiser, for denoiser.load_lora_adapter(folder, prefix=None,
    weight_name="pytorch_lora_weights.safetensors").
    """
    argument = f"{next(iter(denoisers))}_lora"
    for i, (component, denoiser) in enumerate(denoisers.items()):
        if not hasattr(pipe, "save_lora_weights"):
            denoiser.save_lora_adapter(folder / component)
            continue
        weights = {
            f"{argument}_layers": get_peft_model_state_dict(denoiser),
            f"{argument}_adapter_metadata": denoiser.peft_config["default"].to_dict(),
        }
        pipe.save_lora_weights(folder if i == 0 else folder / component, **weights)


def check_targets(component: str, layers: Collection[str], targets: Collection[str]) -> None:
    """Raises: UserError for a LoRA target that is the ending of no layer's name."""
    for target in targets:
        if any(name == target or name.endswith("." + target) for name in layers):
            continue
        candidates = sorted({_ending(name) for name in layers})
        near = difflib.get_close_matches(target, candidates, 3, cutoff=0.3)
        raise UserError(
            f"model.lora.targets: {target!r} matches no layer of {component}"
            f"{'; near: ' + ', '.join(near) if near else ''}; candidates: {', '.join(candidates)}"
        )


def _ending(name: str) -> str:
    """What a layer is called in every block: its last part, with the one before where that is a number."""
    *_, parent, last = ["", *name.split(".")]
    return f"{parent}.{last}" if last.isdigit() else last
