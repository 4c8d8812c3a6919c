"""Weights as reward models publish them: files, names, LoRA factors.

Everything is read as plain tensors; nothing is unpickled into code.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rewards.contract import RewardError, one_line

# What torch, safetensors, open_clip and transformers raise for files that are missing, damaged, or of another model.
LOAD_ERRORS = (
    *(OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError, StopIteration, ImportError),
    *(pickle.UnpicklingError, SafetensorError),
)
PREFIX = "base_model.model."  # that peft puts before every name, once or more
# Names since transformers 4.52 and before, to those of Qwen2VLModel; the first that fits counts.
QWEN2_VL_NAMES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model."),
    ("visual.", "visual."),
    ("model.", "language_model."),
)


def read_tensors(where: str, path: Path) -> dict[str, Tensor]:
    """Read a .safetensors file, or a pickle of nothing but tensors.

    Raises: RewardError for a file that is missing, damaged, or holds anything else.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise RewardError(f"reward {where}: no weights file {path}") from error
    except LOAD_ERRORS as error:
        reason = one_line(error)
        raise RewardError(
            f"reward {where}: {path} cannot be read as plain tensors; copy it again ({reason})"
        ) from error
    for key in ("state_dict", "model"):  # wrappers in use
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise RewardError(f"reward {where}: {path} does not hold a mapping of names to tensors")
    return dict(state)


def read_json(where: str, path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises: RewardError, one line."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise RewardError(f"reward {where}: no {path}") from error
    except ValueError as error:
        raise RewardError(f"reward {where}: {path} is not valid JSON; copy it again ({error})") from error
    if not isinstance(content, dict):
        raise RewardError(f"reward {where}: {path} is not a JSON object")
    return content


def plain_names(state: Mapping[str, Tensor], names: Iterable[tuple[str, str]] = QWEN2_VL_NAMES) -> dict[str, Tensor]:
    """Rename weights to what a model calls them, without peft's prefixes and without the names of its layers.

    LoRA factors end in `.lora_A` and `.lora_B` afterwards; `lm_head.` and `rm_head.` stay.
    """
    renamed = {}
    for name, tensor in state.items():
        while name.startswith(PREFIX):
            name = name.removeprefix(PREFIX)
        name = name.replace(".base_layer.", ".").replace(".default.", ".")
        for factor in (".lora_A", ".lora_B"):
            name = name.removesuffix(".weight") if name.endswith(f"{factor}.weight") else name
        old, new = next(((old, new) for old, new in names if name.startswith(old)), ("", ""))
        renamed[new + name.removeprefix(old)] = tensor
    return renamed


def merge_lora(where: str, state: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Add scale * B A to every weight that has LoRA factors, in float32, and drop the factors."""
    plain = {name: tensor for name, tensor in state.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name, a in state.items():
        if not name.endswith(".lora_A"):
            continue
        layer = name.removesuffix(".lora_A")
        if f"{layer}.weight" not in plain or f"{layer}.lora_B" not in state:
            raise RewardError(f"reward {where}: {layer} has LoRA factors but not its own weight; the checkpoint is cut")
        weight = plain[f"{layer}.weight"]
        product = state[f"{layer}.lora_B"].float() @ a.float()
        plain[f"{layer}.weight"] = (weight.float() + scale * product).to(weight.dtype)
    return plain


def is_hub_id(path: str) -> bool:
    """Whether a path names a repository on the hub, owner/name, and nothing here."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path) is not None and not Path(path).exists()


def snapshot(where: str, repository: str, patterns: list[str]) -> Path:
    """A folder, or a hub id of which the files that match `patterns` are downloaded on first use.

    Raises: RewardError, one line.
    """
    if not is_hub_id(repository):
        if not Path(repository).is_dir():
            raise RewardError(f"reward {where}: {repository} is not a folder here, and it is no hub id, owner/name")
        return Path(repository)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = one_line(error)
        raise RewardError(
            f"reward {where}: {repository} is not a folder here and cannot be fetched from the hub ({reason})"
        ) from error
