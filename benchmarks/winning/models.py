"""The models of a comparison: a base and what was tuned, as plain diffusers loads them, under one set of settings."""

from __future__ import annotations

import contextlib
import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from alignment.check import check_sampling
from alignment.config import Recipe, load_recipe
from alignment.data import Prompt, conditions
from alignment.errors import UserError, in_one_line
from alignment.experts import FOLDER as GATED
from alignment.experts import load_gated
from alignment.lora import load_lora
from alignment.policy import DENOISERS, Policy, denoisers_of, load_pipeline
from alignment.startup import explained

BASE = "base"  # the base model's name
SAMPLING = ("call.", "model.", "sampler.steps=", "sampler.shift=", "evaluation.", "fps=", "batch.rollout=")
SHARED = ("call", "sampler", "evaluation", "fps", "batch")  # sections that are the same for all models
ENDS = 2**20  # bytes at each end of a weight file that tell it from another


class Contender(NamedTuple):
    """One model, and how it samples."""

    name: str
    path: str  # a run folder, a diffusers folder or an id on the hub, as it was given
    recipe: Recipe  # its `model` names the pipeline that is loaded
    run: Path | None = None  # the folder whose saved weights come on top


class Sampler(Policy):
    """A policy that trains nothing: it computes as training's evaluations do."""

    def _make_trainable(self) -> dict[str, nn.Parameter]:
        for denoiser in self.denoisers.values():
            if self.model.trained == "full":
                denoiser.float()
            for name, p in denoiser.named_parameters():
                if "lora_" in name:
                    p.data = p.data.float()
        return {}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """The base model: without the LoRA, where there is one."""
        adapted = any(
            "lora_" in name for denoiser in self.denoisers.values() for name, _ in denoiser.named_parameters()
        )
        with super().reference() if adapted else torch.no_grad():
            yield


def contenders(base: str, tuned: Sequence[str], settings: str | None, overrides: Sequence[str]) -> list[Contender]:
    """The base first. Sampling settings are those of `settings`, a recipe, or else of the first run among the tuned.

    Args:
        tuned: `[NAME=]RUN-or-MODEL`; the default name is that of the folder.
    Raises: UserError for names that are taken, overrides of what does not concern sampling, and what is no model.
    """
    for override in overrides:
        if not override.startswith(SAMPLING):
            known = ", ".join(
                start.rstrip("=").replace(".", ".*") if start[-1] == "." else start[:-1] for start in SAMPLING
            )
            raise UserError(f"override {override!r}: says nothing about sampling; what can be set here: {known}")
    named = {BASE: base}
    for text in tuned:
        name, equals, path = text.partition("=")
        name, path = (name, path) if equals else (Path(text).name, text)
        if not re.fullmatch(r"[\w.-]*\w[\w.-]*", name) or name in named:
            why = "is taken" if name in named else "cannot be a folder's name"
            raise UserError(f"--tuned: {text}: the name {name!r} {why}; give another: NAME={path}")
        named[name] = path
    runs = {name: Path(path) for name, path in named.items() if (Path(path) / "config.yaml").is_file()}
    if BASE in runs:
        raise UserError(f"--base: {base} is a run folder; name the model that it was trained from")
    if settings is None and not runs:
        raise UserError("--settings: no --tuned is a run folder; name a recipe that says how to sample")
    shared = load_recipe(settings or next(iter(runs.values())) / "config.yaml", list(overrides))
    found = []
    for name, path in named.items():
        recipe = load_recipe(runs[name] / "config.yaml", list(overrides)) if name in runs else shared
        recipe = replace(recipe, **{section: getattr(shared, section) for section in SHARED})
        if name not in runs:
            recipe = replace(recipe, model=replace(recipe.model, path=path))
        elif not saved_weights(runs[name]):
            raise UserError(f"--tuned: {path} holds no saved weights (lora/ or transformer/); train it to an end first")
        if recipe.evaluation.trained_share < 1 and name != BASE and not is_lora(runs.get(name)):
            raise UserError(f"evaluation.trained_share: {path} is no LoRA run; set evaluation.trained_share=1")
        found.append(Contender(name, path, recipe, runs.get(name)))
    return found


def is_lora(run: Path | None) -> bool:
    """Whether this is a run whose weights can be taken off again."""
    return run is not None and saved_weights(run)[0].name == "lora"


def check_models(models: Sequence[Contender], prompts: Sequence[Prompt]) -> None:
    """What can be found wrong before weights are loaded. Raises: UserError."""
    from alignment.check import check_images

    for model in models:
        try:
            check_images(check_sampling(model.recipe), prompts, prompts)
        except UserError as error:
            option = "--base" if model.name == BASE else f"--tuned {model.name}"
            raise UserError(f"{option}: {str(error).replace('data.prompts', '--prompts')}") from error


def saved_weights(run: Path) -> list[Path]:
    """The folders that a run wrote for plain diffusers: its gated experts, its LoRA, or the trained denoisers."""
    for name in (GATED, "lora"):
        if (run / name).is_dir():
            return [run / name]
    return [folder for folder in sorted(run.glob("*")) if folder.name.startswith(DENOISERS) and folder.is_dir()]


def fingerprint(model: Contender) -> str:
    """Of the weights that make a model what it is: sizes and ends of their files. Of an id on the hub, the id."""
    folders = saved_weights(model.run) if model.run else [Path(model.path)]
    digest = hashlib.sha256(f"{model.recipe.model.path} {model.recipe.model.revision}".encode())
    for file in sorted(file for folder in folders for file in folder.rglob("*.safetensors")):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(ENDS))
            stream.seek(max(0, size - ENDS))
            digest.update(stream.read(ENDS))
    return digest.hexdigest()[:16]


def load_model(model: Contender, device: torch.device, embeddings: Path) -> Sampler:
    """The pipeline with the run's saved weights on it. Raises: UserError where they do not fit."""
    recipe = model.recipe
    pipe = load_pipeline(recipe.model, device)
    if model.run:
        try:
            put_weights(pipe, model.run, device)
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            raise UserError(
                f"--tuned {model.name}: cannot load what {model.run} saved: {in_one_line(error)}"
            ) from error
    policy = Sampler(pipe, recipe.model, recipe.sampler, recipe.call, device)
    policy.cache_embeddings(Path(recipe.model.embeddings or embeddings))
    return policy


def put_weights(pipe: Any, run: Path, device: torch.device) -> None:
    """Put the saved weights of a run on its pipeline, the way that its owner would in plain diffusers."""
    folders = saved_weights(run)
    if folders[0].name == GATED:
        load_gated(pipe, run)
    elif folders[0].name == "lora":
        load_lora(pipe, denoisers_of(pipe), folders[0], "tuned")
    else:
        denoisers = denoisers_of(pipe)
        for folder in folders:
            tuned = type(denoisers[folder.name]).from_pretrained(folder).to(device)  # float32, as it was saved
            pipe.register_modules(**{folder.name: tuned})


def try_out(policy: Sampler, prompt: Prompt) -> None:
    """Run the pipeline for two steps with the settings' arguments; find out how it wants the image, if there is one.

    Raises: UserError where it cannot run.
    """

    def run() -> None:
        policy.generate([prompt.text] * 2, [0, 1], 2, output_type="latent", **conditions([prompt]))

    try:
        try:
            run()
        except (ValueError, TypeError, IndexError, RuntimeError):
            if prompt.image is None:
                raise
            policy.image_each = True
            run()
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        given = ", ".join(f"{key}={value}" for key, value in policy.call.items())
        reason = explained(error) or f"call: {type(policy.pipe).__name__} cannot run with {given}: {in_one_line(error)}"
        raise UserError(reason) from error
