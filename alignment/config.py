"""The recipe: one YAML file, checked key by key and type by type against these dataclasses.

Fields that only one algorithm reads live in that algorithm's file (alignment/algorithms/<name>.py, class Config).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import math
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from .errors import UserError, one_line


@dataclass
class LoRAConfig:
    rank: int = 16
    alpha: int = 32
    targets: list[str] = field(default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"])  # module name endings


@dataclass
class ModelConfig:
    path: str = MISSING  # a folder, or an id on the model hub
    pipeline: str | None = None  # a diffusers pipeline class; None: what model_index.json says
    revision: str | None = None
    variant: str | None = None  # of the weight files, e.g. fp16
    dtype: str = "float32"  # of frozen weights and of computation: float32, bfloat16 or float16
    vae_dtype: str | None = None  # of the VAE, where it is to differ: Wan's is meant to run in float32
    device: str | None = None  # cpu or cuda; None: cuda where there is one
    device_map: str | None = None  # handed to from_pretrained, e.g. balanced
    trained: str = "lora"  # lora or full; trained weights are always float32
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    gradient_checkpointing: bool = False
    attention: str | None = None  # a diffusers attention backend, e.g. xformers; None: PyTorch's own
    drop_encoders: bool = False  # free the text encoders once all prompts are embedded
    vae_tiling: bool = False
    embeddings: str | None = None  # folder of the prompt-embedding cache; None: inside the run folder


@dataclass
class SamplerConfig:
    steps: int = 20  # denoising steps of a rollout
    kernel: str = "flow"  # see samplers.KERNELS; ignored for variance-preserving models, which use DDIM
    noise_level: float = 0.7
    window: list[int] | None = None  # [start, stop) of the stochastic steps; None: all but the last
    grid: str = "stock"  # stock or uniform
    tail: float | None = None  # share of the steps after the noise that are left, by a higher-order solver; None: Euler
    shift: float | None = None  # overrides the pipeline's time shift, in evaluations too
    shared_noise: bool = True  # one initial noise for a group


@dataclass
class RewardConfig:
    use: str = MISSING  # a known name, package.module:callable or file.py:callable
    weight: float = 1.0  # 0: held out, reported and never trained on
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class DataConfig:
    prompts: str | None = None  # .txt, one a line; .jsonl or .csv with a column "prompt", and "image" (a file)
    preferences: str | None = None  # pairs or groups of videos, .jsonl or .csv: what there is to learn from them
    held_out: str | None = None  # preferences that are never trained on; evaluations say how many the policy shares
    latents: str | None = None  # folder of encoded videos; None: inside the run folder
    shuffle: bool = True


@dataclass
class OptimizerConfig:
    lr: float = 1e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    warmup: int = 0  # iterations
    decay_from: float = 1.0  # share of the run after which the rate falls linearly to 0; 1 keeps it constant


@dataclass
class EMAConfig:
    decay: float = 0.0  # 0: off
    every: int = 1  # updates between two averagings


@dataclass
class BatchConfig:
    rollout: int | None = None  # videos a pipeline call of the rollout; None: all
    update: int | None = None  # videos a pipeline call of the update; None: all. Neither changes the result


@dataclass
class EvaluationConfig:
    prompts: str | None = None  # held-out prompts; None: those of data.prompts
    num_prompts: int = 64
    every: int = 0  # iterations between evaluations; 0: before and after only
    watch: str = "mean"  # the reward whose held-out peak counts: a name, or mean for the weighted sum of the trained;
    # where a reward is trained, the dimension whose held-out accuracy counts, or mean for that of all
    patience: int = 0  # evaluations without a new best that end the run; saved are then the best weights; 0: never
    steps: int | None = None  # denoising steps, with the pipeline's own scheduler; None: those of the sampler
    trained_share: float = 1.0  # of these steps, the first ones; the base model takes the rest: a guard against hacking
    seed: int = 0
    videos: int = 6  # that are kept as mp4
    batch: int | None = None  # videos a pipeline call; None: that of the rollout


@dataclass
class CheckpointConfig:
    every: int = 10  # iterations
    keep: int = 2


@dataclass
class Recipe:
    name: str = MISSING
    output: str | None = None  # the run folder; None: runs/<name>
    seed: int = 0
    iterations: int = 100
    fps: int = 16
    model: ModelConfig = field(default_factory=ModelConfig)
    call: dict[str, Any] = field(default_factory=dict)  # arguments of the pipeline: height, num_frames, guidance_scale
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    max_invalid: float = 0.5  # share of masked samples in an iteration above which the run stops
    algorithm: dict[str, Any] = field(default_factory=dict)  # name, and what that algorithm's Config holds
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracker: str | None = "auto"  # tensorboard, wandb, trackio; auto: TensorBoard where installed; null: none

    @property
    def folder(self) -> Path:
        return Path(self.output or f"runs/{self.name}").expanduser()

    @property
    def trained_rewards(self) -> dict[str, float]:
        return {name: reward.weight for name, reward in self.rewards.items() if reward.weight != 0}

    @property
    def held_out_rewards(self) -> list[str]:
        return [name for name, reward in self.rewards.items() if reward.weight == 0]


CHOICES = {
    "model.dtype": ("float32", "bfloat16", "float16"),
    "model.vae_dtype": (None, "float32", "bfloat16", "float16"),
    "model.trained": ("lora", "full"),
    "model.device": (None, "cpu", "cuda"),
    "sampler.grid": ("stock", "uniform"),
    "tracker": (None, "auto", "tensorboard", "wandb", "trackio"),
}
RESERVED = ("mean", "std", "invalid")  # reward/mean and so on are metrics of the weighted sum
RANGES = {  # what it is called, whether a value is in it, and the keys
    "above 0": (
        lambda v: v > 0,
        "iterations fps model.lora.rank model.lora.alpha sampler.steps sampler.shift",
        "optimizer.lr optimizer.max_grad_norm ema.every batch.rollout batch.update checkpoint.every checkpoint.keep",
        "evaluation.num_prompts evaluation.steps evaluation.batch",
    ),
    "0 or more": (
        lambda v: v >= 0,
        "sampler.noise_level optimizer.weight_decay optimizer.warmup evaluation.every evaluation.videos",
        "evaluation.patience",
    ),
    "above 0, up to 1": (lambda v: 0 < v <= 1, "sampler.tail"),
    "between 0 and 1": (lambda v: 0 <= v <= 1, "max_invalid optimizer.decay_from ema.decay evaluation.trained_share"),
}


def load_recipe(path: str | Path, overrides: list[str] | None = None) -> Recipe:
    """Read a recipe and `key=value` overrides; `algorithm` becomes that algorithm's own Config.

    Raises: UserError in one line that names the file, the key and, for an unknown key, the nearest known one.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such recipe")
    try:
        given = OmegaConf.load(path)
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{path}: line {error.problem_mark.line + 1} is not valid YAML: {error.problem}") from error
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from error
    if not isinstance(given, DictConfig):
        raise UserError(f"{path}: a recipe is a mapping of keys to values")
    given = _override(given, overrides or [])
    given.pop("versions", None)  # a saved config.yaml is a recipe too
    recipe = _typed(Recipe, given, str(path))
    recipe.algorithm = _algorithm_config(recipe.algorithm, str(path))
    _check_values(recipe, str(path))
    return recipe


def save_recipe(recipe: Recipe, path: Path, versions: dict[str, str]) -> None:
    """Write the resolved recipe; the file runs again as it is."""
    values = dataclasses.asdict(recipe)
    name = type(recipe.algorithm).__module__.rpartition(".")[2]
    values["algorithm"] = {"name": name, **dataclasses.asdict(recipe.algorithm)}
    values["versions"] = versions
    temporary = path.with_suffix(".tmp")
    OmegaConf.save(OmegaConf.create(values), temporary)
    temporary.replace(path)


def algorithm_of(recipe: Recipe) -> ModuleType:
    """The file that the recipe's algorithm lives in.

    Every one has Config, check, needs_reference and train, and `chosen` where it learns from given videos. It may have
        make_policy(pipe, recipe, device)       what is trained of the pipeline, in place of adapters
        count_weights(recipe, pipeline, shapes) how much that is
    and where it trains a reward, not a generator,
        evaluate(run, iteration)                in place of sampling videos: eval/accuracy/mean, and of each dimension
        load_model(recipe, device)              in place of a pipeline: anything with `parameters` (name -> float32
                                                parameter), `device`, `evaluations`, `decode_seconds`, `using(weights)`
                                                and `save(folder)`, as Policy has them
        check_model(recipe)                     goes with it: what there is to say of the model, weights unread
        learning_rates(recipe, parameters)      name -> base rate, of the parameters that have one of their own
    """
    return sys.modules[type(recipe.algorithm).__module__]


def trains_reward(recipe: Recipe) -> bool:
    """Whether the algorithm trains a reward, so that there is nothing to sample and no reward to ask."""
    return hasattr(algorithm_of(recipe), "evaluate")


def known_algorithms() -> list[str]:
    return sorted(p.stem for p in (Path(__file__).parent / "algorithms").glob("[!_]*.py"))


def _override(given: DictConfig, overrides: list[str]) -> DictConfig:
    for override in overrides:
        if not re.match(r"[\w.-]+=", override):
            raise UserError(f"override {override!r}: expected key=value")
        try:
            given = OmegaConf.merge(given, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError) as error:
            raise UserError(f"override {override!r}: {getattr(error, 'problem', None) or one_line(error)}") from error
    return given


def _typed(schema: type, given: DictConfig, where: str, prefix: str = "") -> Any:
    """Merge `given` into the schema, as a plain instance of it."""
    try:
        _check_keys(schema, OmegaConf.to_container(given), where, prefix)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), given))
    except MissingMandatoryValue as error:
        raise UserError(f"{where}: missing key {prefix}{error.full_key}") from error
    except OmegaConfBaseException as error:
        wrong = "expected a list, such as [a, b]" if "is not a ListConfig" in str(error) else one_line(error)
        raise UserError(f"{where}: {prefix}{error.full_key or ''}: {wrong}") from error


def _check_keys(schema: type, given: Any, where: str, prefix: str) -> None:
    """Refuse unknown keys, and anything but a mapping where one is expected, down to the leaves."""
    types = get_type_hints(schema)
    for key, value in _mapping(given, where, prefix.rstrip(".")).items():
        if key not in types:
            raise UserError(f"{where}: unknown key {prefix}{key}; {_nearest(str(key), types)}")
        if dataclasses.is_dataclass(types[key]):
            _check_keys(types[key], value, where, f"{prefix}{key}.")
        elif get_origin(types[key]) is dict:
            part = get_args(types[key])[1]
            for name, inner in _mapping(value, where, f"{prefix}{key}").items():
                if dataclasses.is_dataclass(part):
                    _check_keys(part, inner, where, f"{prefix}{key}.{name}.")


def _mapping(given: Any, where: str, key: str) -> dict[Any, Any]:
    if not isinstance(given, dict):
        raise UserError(f"{where}: {key}: expected keys and values, got {'nothing' if given is None else repr(given)}")
    return given


def _nearest(word: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(word, list(known), 1, cutoff=0.5)
    return f"did you mean {found[0]}?" if found else f"known: {', '.join(known)}"


def _algorithm_config(given: dict[str, Any], where: str) -> Any:
    known = known_algorithms()
    name = given.get("name")
    if name is None:
        raise UserError(f"{where}: missing key algorithm.name; known: {', '.join(known)}")
    if name not in known:
        raise UserError(f"{where}: algorithm.name: {name!r} is not an algorithm; {_nearest(str(name), known)}")
    module = importlib.import_module(f"alignment.algorithms.{name}")
    rest = {key: value for key, value in given.items() if key != "name"}
    return _typed(module.Config, OmegaConf.create(rest), where, "algorithm.")


def _check_values(recipe: Recipe, where: str) -> None:
    def value(key: str) -> Any:
        return functools.reduce(getattr, key.split("."), recipe)

    if not (recipe.data.prompts or recipe.data.preferences):
        raise UserError(f"{where}: missing key data.prompts, or data.preferences for what learns from given videos")
    if recipe.data.prompts and recipe.data.preferences:
        raise UserError(f"{where}: data: preferences bring their own prompts; leave data.prompts out")
    for key, choices in CHOICES.items():
        if value(key) not in choices:
            named = ", ".join("null" if choice is None else choice for choice in choices)
            raise UserError(f"{where}: {key}: {value(key)!r} is none of {named}")
    for what, (holds, *keys) in RANGES.items():
        for key in " ".join(keys).split():
            if value(key) is not None and not (math.isfinite(value(key)) and holds(value(key))):
                raise UserError(f"{where}: {key}: {value(key)} is not {what}")
    if recipe.sampler.window is not None and len(recipe.sampler.window) != 2:
        raise UserError(f"{where}: sampler.window: {recipe.sampler.window} is not [start, stop]")
    of, names = "reward", ["mean", *recipe.rewards]
    if trains_reward(recipe):
        of, names = "dimension", ["mean", *getattr(recipe.algorithm, "dimensions", [])]
    if recipe.evaluation.watch not in names:
        near = _nearest(recipe.evaluation.watch, names)
        raise UserError(f"{where}: evaluation.watch: {recipe.evaluation.watch!r} is no {of} of this recipe; {near}")
    if recipe.evaluation.patience and not recipe.evaluation.every:
        raise UserError(f"{where}: evaluation.patience: no evaluation on the way; set evaluation.every above 0")
    if not recipe.model.lora.targets:
        raise UserError(f"{where}: model.lora.targets: names no layer")
    betas = recipe.optimizer.betas
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise UserError(f"{where}: optimizer.betas: {betas} is not two numbers from 0 to below 1")
    for name, reward in recipe.rewards.items():
        if name in RESERVED or not re.fullmatch(r"[\w.-]+", name):
            raise UserError(f"{where}: rewards.{name}: cannot be a reward's name; metrics are called reward/{name}")
        if not math.isfinite(reward.weight):
            raise UserError(f"{where}: rewards.{name}.weight: {reward.weight} is not finite")
    if trains_reward(recipe) and recipe.rewards:
        raise UserError(f"{where}: rewards: this algorithm trains one and asks none; leave them out")
    if not recipe.trained_rewards and not trains_reward(recipe):
        raise UserError(f"{where}: rewards: none has a weight; name at least one to train on, or to evaluate by")
