"""Everything about a recipe that can be found wrong before weights are loaded."""

from __future__ import annotations

import difflib
import inspect
import json
import math
import shutil
import struct
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .config import Recipe, algorithm_of, trains_reward
from .data import Prompt, check_media, read_preferences
from .errors import UserError
from .lora import check_targets
from .pairs import PairConfig
from .policy import DENOISERS
from .preference import MatchingConfig
from .training import evaluation_prompts, training_prompts

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
OURS = ("prompt", "num_inference_steps", "generator", "latents", "output_type", "return_dict")


def check_recipe(recipe: Recipe, processes: int = 1) -> list[str]:
    """Check files, classes, rewards and combinations; return what there is to say about memory and sizes.

    Raises: UserError for the first thing found wrong.
    """
    from rewards import RewardError
    from rewards import check as check_reward

    algorithm, own = algorithm_of(recipe), trains_reward(recipe)
    loads = hasattr(algorithm, "load_model")
    pipeline = check_machine(recipe) if loads else check_sampling(recipe)
    if recipe.data.preferences and not (own or isinstance(recipe.algorithm, MatchingConfig)):
        name = algorithm.__name__.rpartition(".")[2]
        raise UserError(f"data.preferences: {name} learns from samples of its own; name data.prompts instead")
    if recipe.data.held_out and not (own or isinstance(recipe.algorithm, PairConfig)):
        raise UserError("data.held_out: is for algorithms that tell pairs apart, as flow_dpo; leave it out")
    if wrong := algorithm.check(recipe, processes):
        raise UserError(wrong[0])
    if recipe.evaluation.num_prompts < processes and not own:
        raise UserError(f"evaluation.num_prompts: {recipe.evaluation.num_prompts} for {processes} processes")
    prompts, held_out = training_prompts(recipe), evaluation_prompts(recipe)
    for key in ("preferences", "held_out"):
        if path := getattr(recipe.data, key):
            records = read_preferences(path, f"data.{key}")
            check_media(records, f"data.{key}: {path}")
            algorithm.chosen(recipe, records, f"data.{key}: {path}")
    for name, reward in recipe.rewards.items():
        try:
            check_reward(reward.use, **reward.options)
        except RewardError as error:
            raise UserError(f"rewards.{name}: {error}") from error
    if loads:
        return [f"{len(prompts)} prompts", *algorithm.check_model(recipe)]
    check_images(pipeline, prompts, held_out)
    notes = [f"{len(prompts)} prompts, pipeline {pipeline.__name__}"]
    return notes + memory_estimate(recipe)


def check_sampling(recipe: Recipe) -> type:
    """What it takes to sample: the sampler, the machine, the pipeline, whose class is returned.

    Raises: UserError for the first thing found wrong.
    """
    from samplers import KERNELS

    if recipe.sampler.kernel not in KERNELS:
        raise UserError(f"sampler.kernel: {recipe.sampler.kernel!r} is none of {', '.join(KERNELS)}")
    if recipe.sampler.kernel in ("cps", "ddim") and recipe.sampler.noise_level > 1:
        raise UserError(
            f"sampler.noise_level: {recipe.sampler.noise_level}; kernel {recipe.sampler.kernel} takes 0 to 1"
        )
    check_machine(recipe)
    return check_pipeline(recipe)


def check_machine(recipe: Recipe) -> None:
    """What the recipe asks of this machine is there: the device and the tracker's package."""
    import accelerate.utils
    import torch

    if recipe.model.device == "cuda" and not torch.cuda.is_available():
        raise UserError("model.device: cuda is not available here; set it to cpu, or to null for what there is")
    if recipe.tracker not in (None, "auto"):
        installed = getattr(accelerate.utils, f"is_{recipe.tracker}_available", lambda: False)
        if not installed():
            raise UserError(f"tracker: {recipe.tracker} is not installed; install it, or set tracker to null")


def check_pipeline(recipe: Recipe) -> type:
    """The pipeline class; its folder, if it is one, is complete; `call` holds only arguments that it takes."""
    import diffusers

    path, name = Path(recipe.model.path), recipe.model.pipeline
    if path.is_dir():
        name = name or pipeline_folder_class(path)
    elif looks_local(recipe.model.path):
        raise UserError(f"model.path: no such folder: {path}")
    elif name is None:
        name = "DiffusionPipeline"
    cls = getattr(diffusers, str(name), None)
    if not (inspect.isclass(cls) and issubclass(cls, diffusers.DiffusionPipeline)):
        near = difflib.get_close_matches(str(name), [n for n in dir(diffusers) if n.endswith("Pipeline")], 1)
        raise UserError(f"model.pipeline: diffusers has no {name!r}{'; did you mean ' + near[0] + '?' if near else ''}")
    if "image" in recipe.call:
        raise UserError('call.image: an image belongs to a prompt; name it in a column "image" of data.prompts')
    if cls is not diffusers.DiffusionPipeline:
        known = [p for p in inspect.signature(cls.__call__).parameters if p != "self"]
        for key in recipe.call:
            if key in OURS:
                raise UserError(f"call.{key}: is set by the toolkit; remove it")
            if key not in known:
                near = difflib.get_close_matches(key, known, 1)
                hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
                raise UserError(f"call.{key}: {cls.__name__} takes no such argument; {hint}")
    return cls


def check_images(pipeline: type, prompts: Sequence[Prompt], held_out: Sequence[Prompt]) -> None:
    """The prompts have images where the pipeline starts from one, and none where it takes none.

    Raises: UserError that names the first prompt that has to change. Nothing can be said of an unknown class.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    name, takes = pipeline.__name__, "image" in parameters
    if name == "DiffusionPipeline":
        return
    # Elsewhere text alone will do: pipelines of many uses, editors of images.
    needs = takes and (parameters["image"].default is inspect.Parameter.empty or "ImageToVideo" in name)
    for key, some in (("data.prompts", prompts), ("evaluation.prompts", held_out)):
        for prompt in some:
            if needs and prompt.image is None:
                raise UserError(f'{key}: {name} starts from an image, {prompt.text!r} has none; add a column "image"')
            if prompt.image is not None and not takes:
                raise UserError(f'{key}: {name} takes no image, {prompt.text!r} has one; rename the column "image"')


def looks_local(path: str) -> bool:
    """Whether a model path is meant as a folder: hub ids have one slash, and no dots or slashes in front."""
    return path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).parent.is_dir()


def pipeline_folder_class(path: Path) -> str:
    """Check a diffusers folder: index, components, whole weight files. Returns the pipeline's class name."""
    index = path / "model_index.json"
    if not index.is_file():
        raise UserError(f"model.path: {path} holds no model_index.json; it is not a saved diffusers pipeline")
    content = _json(index)
    for name, entry in content.items():
        if name.startswith("_") or not isinstance(entry, list) or entry[:1] == [None]:
            continue
        if not (path / name).is_dir():
            raise UserError(f"model.path: {path}: component {name} is missing; copy the folder again")
        is_model = (path / name / "config.json").is_file() and not name.startswith("tokenizer")
        if is_model and not any((path / name).glob("*.safetensors")) and not any((path / name).glob("*.bin")):
            raise UserError(f"model.path: {path / name} holds no weights; copy the folder again")
    for shard_index in path.glob("*/*.safetensors.index.json"):
        for shard in set(_json(shard_index).get("weight_map", {}).values()):
            if not (shard_index.parent / shard).is_file():
                raise UserError(f"model.path: {shard_index.parent / shard} is missing; copy the folder again")
    for weights in path.glob("*/*.safetensors"):
        safetensors_header(weights)
    return str(content.get("_class_name"))


def safetensors_header(path: Path) -> dict[str, Any]:
    """The header of a weight file, after checking that the file is as long as it says."""
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > size - 8:
            raise UserError(f"model.path: {path} is cut short ({size} bytes); copy it again")
        try:
            header = json.loads(file.read(length))
        except ValueError as error:
            raise UserError(f"model.path: {path} is not a safetensors file") from error
    end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
    if size < 8 + length + end:
        raise UserError(f"model.path: {path} is cut short ({size} of {8 + length + end} bytes); copy it again")
    return header


def memory_estimate(recipe: Recipe) -> list[str]:
    """Weights and optimiser state in words, from file headers; nothing where the model is not on this machine.

    Raises: UserError for a LoRA target that matches no layer, and what an algorithm's own count finds.
    """
    path, model = Path(recipe.model.path), recipe.model
    if not path.is_dir():
        return [f"{path} is not on this machine: its memory is unknown until it is"]
    frozen, trained, adapted, weights = 0, 0, 0, 0
    denoisers = defaultdict(dict)  # component -> layer -> shape of its weight
    for file in sorted(path.glob("*/*.safetensors")):
        component = file.parent.name
        variant = (
            file.suffixes[0].partition("-")[0] if len(file.suffixes) > 1 else None
        )  # model.fp16-00001-of-2.safetensors
        if variant != (model.variant and f".{model.variant}"):
            continue  # the same weights in another precision
        dtype = model.vae_dtype if component == "vae" and model.vae_dtype else model.dtype
        for name, entry in safetensors_header(file).items():
            if name == "__metadata__":
                continue
            is_denoiser, shape = component.startswith(DENOISERS), entry["shape"]
            if is_denoiser and name.endswith(".weight") and len(shape) > 1:
                denoisers[component][name.removesuffix(".weight")] = shape
            if is_denoiser and model.trained == "full":
                trained += math.prod(shape)
            else:
                frozen += math.prod(shape)
                weights += math.prod(shape) * BYTES[dtype]
    algorithm = algorithm_of(recipe)
    own = hasattr(algorithm, "count_weights")  # trains something else
    if own:
        trained, adapters, adapted = algorithm.count_weights(recipe, check_pipeline(recipe), denoisers)
        frozen, weights = frozen + adapters, weights + adapters * 4
    for component, layers in denoisers.items() if model.trained == "lora" and not own else ():
        check_targets(component, layers, model.lora.targets)
        for name, shape in layers.items():
            if any(f".{name}".endswith(f".{target}") for target in model.lora.targets):
                adapted += 1
                trained += model.lora.rank * (shape[0] + math.prod(shape[1:]))
    weights += trained * 4
    state = trained * (4 + 8 + 4 * bool(recipe.ema.decay) + 4 * bool(recipe.evaluation.patience))
    where = f" on {adapted} layers" if model.trained == "lora" else ""
    return [
        f"trained parameters {trained:,}{where}, frozen {frozen:,}",
        f"memory for weights {_size(weights)}, for gradients and optimiser {_size(state)}; activations and videos come "
        "on top (batch.rollout, batch.update and model.gradient_checkpointing bound them)",
    ]


def check_disk(folder: Path, trained: int, recipe: Recipe) -> None:
    """Enough room for the checkpoints that are kept, one in the making, and 200 MB of samples and metrics."""
    one = trained * 4 * (3 + bool(recipe.ema.decay) + bool(recipe.evaluation.patience))
    needed = one * (recipe.checkpoint.keep + 1) + trained * 4 + 200 * 2**20
    existing = next(parent for parent in [folder.absolute(), *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise UserError(
            f"output: {folder} has {_size(free)} free and the run may need {_size(needed)}; "
            "free some, set output to another disk, or lower checkpoint.keep"
        )


def _json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"model.path: {path} is not valid JSON; copy the folder again") from error


def _size(num_bytes: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    raise AssertionError
