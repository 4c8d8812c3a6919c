"""CLIP checkpoints in open_clip's form and in that of transformers: found first, read later.

M images, N prompts, D embedding
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

from rewards.checkpoints import LOAD_ERRORS, is_hub_id, read_json, read_tensors
from rewards.contract import RewardError, one_line
from rewards.encoders.encoder import Source, Towers
from rewards.encoders.images import prepare
from rewards.encoders.transformers_clip import TransformersSource

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pth")  # what open_clip looks for in a folder


class OpenClipSource(NamedTuple):
    """A model of open_clip, as arguments of open_clip.create_model."""

    model: str | None  # a built-in name, local-dir:folder or hf-hub:owner/name; None: the architecture is `config`
    where: str  # for messages
    pretrained: str | None = None
    config: Mapping[str, Any] | None = None  # open_clip_config.json as an object
    tokenizer: Path | None = None  # folder with the tokenizer's files, where `config` names none that open_clip has
    weights: Path | None = None  # a file that must hold exactly the model's tensors
    preprocess: Mapping[str, Any] | None = None  # None: open_clip knows it
    quick_gelu: bool = False

    def load(self, name: str, precision: str, device: torch.device) -> Towers:
        try:
            # The weights are drawn, on the CPU, before they are loaded.
            with TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]), _no_false_alarm():
                model, tokenizer = self._create(Path(folder), precision, device)
        except LOAD_ERRORS as error:
            raise cannot_load(name, self.where, error) from error
        if self.weights is not None:
            _load_strictly(name, model, self.weights)
        model.eval().requires_grad_(False)
        preprocess = model.visual.preprocess_cfg
        size = preprocess["size"]
        return Towers(
            model,
            model.encode_image,
            lambda prompts: model.encode_text(tokenizer(prompts).to(device)),
            partial(prepare, config=preprocess),
            (size, size) if isinstance(size, int) else tuple(size),
            preprocess["mean"],
            preprocess["std"],
        )

    def _create(self, folder: Path, precision: str, device: torch.device) -> tuple[torch.nn.Module, Any]:
        import open_clip

        model = self.model
        if model is None:  # open_clip reads an architecture that it does not know from a folder only
            (folder / "open_clip_config.json").write_text(json.dumps(self.config))
            for file in self.tokenizer.glob("tokenizer*.json") if self.tokenizer else ():
                shutil.copy(file, folder)
            model = f"local-dir:{folder}"
        built = open_clip.create_model(
            model,
            self.pretrained,
            load_weights=self.weights is None,
            precision=precision,
            device=device,
            force_preprocess_cfg=self.preprocess,
            force_quick_gelu=self.quick_gelu,
            require_pretrained=self.weights is None,
            pretrained_text=False,
            weights_only=True,
        )
        return built, open_clip.get_tokenizer(model)


@contextmanager
def _no_false_alarm() -> Iterator[None]:
    """Drop what open_clip says of missing weights: ours are read right afterwards, and where none are it raises."""

    def is_true(record: logging.LogRecord) -> bool:
        return not re.search("No pretrained weights loaded|no CLIP weights found", record.getMessage())

    logging.getLogger().addFilter(is_true)
    try:
        yield
    finally:
        logging.getLogger().removeFilter(is_true)


def cannot_load(name: str, where: str, error: Exception) -> RewardError:
    reason = one_line(error) or type(error).__name__
    return RewardError(
        f"reward {name}: cannot load {where}: {reason} (a half-written file looks like this, and so do the weights of "
        "another architecture: copy or download it again, or correct model)"
    )


def _load_strictly(name: str, model: torch.nn.Module, weights: Path) -> None:
    state = read_tensors(name, weights)
    if all(key.startswith("module.") for key in state):  # saved from a distributed wrapper
        state = {key.removeprefix("module."): value for key, value in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise cannot_load(name, str(weights), error) from error


def find(name: str, model: str | Path | None, pretrained: str | None, path: str | Path | None) -> Source:
    """Resolve the ways to name a checkpoint; see rewards.clip.CLIPReward. Raises: RewardError, one line."""
    model, path = (None if place is None else str(place) for place in (model, path))
    if path is not None and model is None:
        if pretrained is not None:
            raise RewardError(f"reward {name}: pretrained {pretrained!r} without model; {path} says both itself")
        return _find_by_path(name, path)
    if model is None or (pretrained is None and path is None):
        raise RewardError(
            f"reward {name}: no checkpoint named; give path (a folder in the format of open_clip or transformers, "
            "hf-hub:owner/name or owner/name), or model with pretrained (a published tag) or path (a weights file)"
        )
    if path is not None and model.endswith(".json"):
        return find_by_config(name, Path(model), Path(path))
    return find_built_in(name, model, pretrained, path)


def _find_by_path(name: str, path: str) -> Source:
    if path.startswith("hf-hub:"):
        return OpenClipSource(path, path)
    folder = Path(path.removeprefix("local-dir:"))
    if (folder / "config.json").is_file() and not (folder / "open_clip_config.json").is_file():
        return TransformersSource.find(name, path)
    if is_hub_id(path):
        return TransformersSource.find(name, path)
    return _find_folder(name, folder)


def _find_folder(name: str, folder: Path) -> Source:
    if folder.is_file():
        raise RewardError(f"reward {name}: {folder} is a file, so its architecture must be named: model=ViT-B-32, say")
    config = folder / "open_clip_config.json"
    if not config.is_file():
        raise RewardError(
            f"reward {name}: no {config}, nor config.json; path is a folder that holds it and the weights"
        )
    if not {"model_cfg", "preprocess_cfg"} <= read_json(name, config).keys():
        raise RewardError(f"reward {name}: {config} lacks model_cfg or preprocess_cfg; write both (open_clip does)")
    if not any(file.suffix in WEIGHT_SUFFIXES for file in folder.iterdir()):
        raise RewardError(f"reward {name}: no weights ({', '.join(WEIGHT_SUFFIXES)}) in {folder}; copy them there")
    return OpenClipSource(f"local-dir:{folder}", str(folder))


def find_by_config(name: str, config: Path, weights: Path) -> Source:
    """An architecture from a file, as in open_clip/model_configs or as open_clip_config.json, and a weights file.

    A tokenizer of Hugging Face lies beside the architecture.
    """
    content = read_json(name, config)
    content = content if "model_cfg" in content else {"model_cfg": content}
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(content["model_cfg"])
    if missing:
        raise RewardError(f"reward {name}: {config} lacks {', '.join(sorted(missing))} of an open_clip architecture")
    own = config.parent if "hf_tokenizer_name" in content["model_cfg"]["text_cfg"] else None
    where = f"{config} with {weights}"
    return OpenClipSource(None, where, config=content, tokenizer=own, weights=check_file(name, weights))


def find_built_in(name: str, model: str, pretrained: str | None, path: str | None) -> Source:
    """An architecture that open_clip knows, with published weights or a file."""
    from open_clip.pretrained import get_pretrained_cfg

    tags = check_built_in(name, model)
    if pretrained is not None and pretrained not in tags:
        hint = "; a weights file is given as path" if Path(pretrained).exists() else ""
        raise RewardError(f"reward {name}: {model} has no weights {pretrained!r}; known: {', '.join(tags)}{hint}")
    if path is None:
        quick_gelu = get_pretrained_cfg(model, pretrained).get("quick_gelu", False)
        return OpenClipSource(model, f"{model} {pretrained}", pretrained, quick_gelu=quick_gelu)
    check_file(name, Path(path))
    # open_clip takes a file's image preparation from nowhere: SigLIP weights would see CLIP's mean and crop.
    keys = ("mean", "std", "interpolation", "resize_mode")
    configs = [get_pretrained_cfg(model, tag) for tag in ([pretrained] if pretrained else tags)]
    preparations = [{key: config[key] for key in keys if config.get(key) is not None} for config in configs]
    if any(preparation != preparations[0] for preparation in preparations):
        raise RewardError(
            f"reward {name}: weights of {model} expect different image preparations; say which {path} holds with "
            f"pretrained=, one of {', '.join(tags)}"
        )
    quick_gelu = bool(pretrained) and configs[0].get("quick_gelu", False)
    preprocess = preparations[0] if preparations else None
    return OpenClipSource(model, path, path, preprocess=preprocess, quick_gelu=quick_gelu)


def check_built_in(name: str, model: str) -> list[str]:
    """The tags of the published weights of an architecture that open_clip knows. Raises: RewardError for another."""
    from difflib import get_close_matches

    import open_clip

    if model not in open_clip.list_models():
        near = ", ".join(get_close_matches(model, open_clip.list_models())) or "see open_clip.list_models()"
        raise RewardError(f"reward {name}: open_clip has no model {model!r}; near: {near}")
    return open_clip.list_pretrained_tags_by_model(model)


def check_file(name: str, path: Path) -> Path:
    if not path.is_file():
        raise RewardError(f"reward {name}: no weights file {path}; beside model, path names one")
    return path
