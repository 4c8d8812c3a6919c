"""Low-rank adapters (LoRA, arXiv 2106.09685) on a pipeline's denoisers, through peft as diffusers does it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE as FILE
from diffusers.loaders.lora_base import LoraBaseMixin
from peft import LoraConfig as PeftLoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor, nn

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
    """Write adapters as the pipeline's own load_lora_weights takes them (see `write_lora`)."""
    adapters = {
        component: (get_peft_model_state_dict(denoiser), denoiser.peft_config["default"].to_dict())
        for component, denoiser in denoisers.items()
    }
    write_lora(pipe, adapters, folder)


def write_lora(pipe: Any, adapters: dict[str, tuple[dict[str, Tensor], dict[str, Any]]], folder: Path) -> None:
    """Write the weights and the configuration of each denoiser's adapter: pytorch_lora_weights.safetensors.

    A second expert goes to a folder of its own inside (load_lora_weights(..., load_into_transformer_2=True)); a
    pipeline without LoRA loading gets one folder a denoiser, for denoiser.load_lora_adapter(folder, prefix=None,
    weight_name="pytorch_lora_weights.safetensors").
    """
    argument = f"{next(iter(adapters))}_lora"
    files = lora_files(type(pipe), adapters, folder)
    for component, (weights, metadata) in adapters.items():
        target = files[component][0].parent
        if hasattr(pipe, "save_lora_weights"):
            options = {f"{argument}_layers": weights, f"{argument}_adapter_metadata": metadata}
            pipe.save_lora_weights(target, **options)
        else:
            LoraBaseMixin.write_lora_layers(weights, target, True, FILE, None, True, metadata)


def load_lora(pipe: Any, denoisers: dict[str, nn.Module], folder: Path, adapter: str) -> None:
    """Put what `write_lora` wrote on the denoisers, as an adapter of this name."""
    for i, (component, (file, _)) in enumerate(lora_files(type(pipe), denoisers, folder).items()):
        if hasattr(pipe, "load_lora_weights"):
            into = {f"load_into_{component}": True} if i else {}
            pipe.load_lora_weights(file.parent, weight_name=FILE, adapter_name=adapter, **into)
        else:
            options = {"prefix": None, "weight_name": FILE, "adapter_name": adapter}
            denoisers[component].load_lora_adapter(file.parent, **options)


def lora_files(pipeline: type, components: Iterable[str], folder: Path) -> dict[str, tuple[Path, str]]:
    """Where each denoiser's adapter lies in a LoRA's folder, and what the names of its weights begin with."""
    first, *others = components
    if not hasattr(pipeline, "save_lora_weights"):
        return {component: (folder / component / FILE, "") for component in (first, *others)}
    named = {first: folder, **{component: folder / component for component in others}}
    return {component: (where / FILE, f"{first}.") for component, where in named.items()}


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
