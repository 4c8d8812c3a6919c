"""VideoReward's training (VideoAlign, arXiv 2501.13918; code at 219ab9d): telling videos apart as people do.

    score      linear head on the last hidden state of a special token, one token a dimension, of a Qwen2-VL that is
               shown the video and a text; trained are LoRA on the language model, the whole vision tower, the tokens'
               embeddings and the head
    loss       btt: Bradley-Terry with ties; bt: without; regression: squared error to scores;
               yes_no: cross-entropy of "Yes" for the better and "No" for the worse one, in the words of a judge

The mean is over all cells, pairs times dimensions, those without a label included, as published: every label weighs the
same. What a run leaves: reward/ for rewards.load("video_reward", path="RUN/reward"), of yes_no judge/ for
rewards.load("vlm_yes", model="RUN/judge", template="RUN/judge/question.txt", frames=...).

Differs from the code: in regression the mean of the training scores is subtracted in place of 3; new tokens begin near
the mean of all; `pairs: all` compares all scored clips of a batch, whatever their prompts; with `ties: half` bt learns
from ties, too. One prepared set of frames serves all epochs (the code has no augmentation, either). Two processes equal
one where lora_dropout is 0.

Logs: loss, accuracy/<dimension> (of the batch's decided pairs), margin (score of the better one minus the worse one's);
evaluations, on data.held_out: eval/accuracy/<dimension>, eval/accuracy/mean, eval/loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from rewards import RewardError
from rewards.checkpoints import is_hub_id

from ..config import Recipe
from ..data import Group, Pair, Stream, read_preferences
from ..early_stop import best_weights, peak
from ..errors import UserError
from ..reward_training.config import RewardModelConfig
from ..reward_training.data import Example, check_examples, check_prompts, examples_of, videos_of
from ..reward_training.learning import centre_of, load, measured, ranked, update
from ..reward_training.losses import TIES
from ..reward_training.model import Description, RewardModel, Trainee, open_reader
from ..reward_training.templates import read_template
from ..reward_training.yes_no import YesNoModel, check_prompt, check_yes_no, open_processor
from ..tally import Tally
from ..training import Run

LOSSES = ("btt", "bt", "regression", "yes_no")
PAIRS = ("given", "all")


@dataclass
class Config(RewardModelConfig):
    pass


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = [
        f"algorithm.{key}: {getattr(config, key)!r} is none of {', '.join(choices)}"
        for key, choices in (("loss", LOSSES), ("ties", TIES), ("pairs", PAIRS))
        if getattr(config, key) not in choices
    ]
    if config.positions not in (None, "row", "native"):
        wrong.append(f"algorithm.positions: {config.positions!r} is none of null, row, native")
    for key in ("preferences", "held_out"):
        if getattr(recipe.data, key) is None:
            wrong.append(
                f"data.{key}: names no file; a reward model learns from labels, and is judged by held-out ones"
            )
    if not config.dimensions or len(set(config.dimensions)) < len(config.dimensions):
        wrong.append(f"algorithm.dimensions: {config.dimensions} is not one or more names, each once")
    if "mean" in config.dimensions:
        wrong.append("algorithm.dimensions: mean is what their accuracies are averaged to; choose another name")
    positive = ("batch_size", "fps", "min_pixels", "workers", "frames_gb", "vision_lr", "merger_lr", "token_lr")
    for key in positive:
        if getattr(config, key) is not None and not getattr(config, key) > 0:
            wrong.append(f"algorithm.{key}: {getattr(config, key)} is not above 0")
    if config.batch_size < processes:
        wrong.append(f"algorithm.batch_size: {config.batch_size} cannot be dealt to {processes} processes")
    if config.theta <= 1:
        wrong.append(f"algorithm.theta: {config.theta} is not above 1")
    if config.tie_eps < 0:
        wrong.append(f"algorithm.tie_eps: {config.tie_eps} is below 0")
    if not 0 <= config.lora_dropout < 1:
        wrong.append(f"algorithm.lora_dropout: {config.lora_dropout} is not from 0 to below 1")
    if config.max_pixels < config.min_pixels:
        wrong.append(f"algorithm.max_pixels: {config.max_pixels} is below min_pixels, {config.min_pixels}")
    if config.num_frames is not None and config.num_frames < 2:
        wrong.append(f"algorithm.num_frames: {config.num_frames} is below 2")
    if config.norm_videos < 2:
        wrong.append(f"algorithm.norm_videos: {config.norm_videos} is below 2, of which no deviation can be had")
    if config.pairs == "all" and config.loss not in ("bt", "btt"):
        wrong.append(f"algorithm.pairs: all is for losses that compare, bt and btt, not {config.loss}")
    if recipe.model.dtype == "float16":
        wrong.append("model.dtype: float16 gradients vanish here; use bfloat16")
    if config.from_scratch and (recipe.model.trained != "full" or not config.vision or recipe.model.dtype != "float32"):
        wrong.append(
            "algorithm.from_scratch: all weights have to be trained; set model.trained to full, algorithm.vision to "
            "true and model.dtype to float32"
        )
    for key in ("revision", "variant", "device_map", "attention", "pipeline"):
        if getattr(recipe.model, key) is not None:
            wrong.append(f"model.{key}: is for pipelines of diffusers; leave it out")
    return wrong + (check_yes_no(recipe) if config.loss == "yes_no" else _check_template(config))


def _check_template(config: Config) -> list[str]:
    """What is wrong with the file, if there is one."""
    try:
        read_template(config.template, config.dimensions)
    except RewardError as error:
        return [f"algorithm.template: {error}"]
    return []


def check_model(recipe: Recipe) -> list[str]:
    """What there is to say of the model; its small files and all prompts are looked at.

    Raises: UserError, or Problems with a line for each prompt.
    """
    config: Config = recipe.algorithm
    if is_hub_id(recipe.model.path):
        return [f"{recipe.model.path} is not on this machine: its memory is unknown until it is"]
    reader = None if config.loss == "yes_no" else open_reader(recipe)
    check_one = reader.check_prompt if reader else partial(check_prompt, open_processor(recipe.model.path))
    if not config.from_scratch and not any(Path(recipe.model.path).glob("*.safetensors")):
        raise UserError(f"model.path: {recipe.model.path} holds no weights; copy them, or set algorithm.from_scratch")
    for key in ("preferences", "held_out"):
        path = getattr(recipe.data, key)
        check_prompts(read_preferences(path), check_one, f"data.{key}: {path}")
    return [f"{reader.config.model_type}, tokens at {reader.positions} positions"] if reader else []


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return False


def load_model(recipe: Recipe, device: torch.device) -> Trainee:
    """What is trained. Raises: UserError."""
    return (YesNoModel if recipe.algorithm.loss == "yes_no" else RewardModel)(recipe, device)


def learning_rates(recipe: Recipe, parameters: dict[str, Tensor]) -> dict[str, float]:
    """The base rates of parameters that have one of their own."""
    config: Config = recipe.algorithm
    found = {}
    for name in parameters:
        rate = None
        if "visual." in name:
            rate = config.merger_lr if "merger" in name else config.vision_lr
        elif name.endswith("embed_tokens.rows"):
            rate = config.token_lr
        if rate is not None:
            found[name] = rate
    return found


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    config, model = run.recipe.algorithm, run.policy
    given, held_out = (run.given.chosen(key, chosen) for key in ("preferences", "held_out"))
    stream = Stream(given, run.recipe.seed, run.recipe.data.shuffle)
    centre = centre_of(given, len(config.dimensions))
    for key in ("preferences", "held_out"):
        path = getattr(run.recipe.data, key)
        check_prompts(run.given.records(path), model.check_prompt, f"data.{key}: {path}")
    model.describe = partial(described, run, held_out)

    def share(iteration: int) -> list[Example]:
        return run.processes.share(stream.take((iteration - 1) * config.batch_size, config.batch_size))

    for iteration in run.iterations():
        tally, examples = Tally(), share(iteration)
        model.videos.ahead([*videos_of(examples), *videos_of(share(iteration + 1))])
        update(run, load(run, examples), centre, tally)
        run.log(tally.metrics(run))


def chosen(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[Example]:
    """The labelled records. Raises: UserError where a dimension has no label; Problems for clips without a video."""
    config: Config = recipe.algorithm
    examples = examples_of(records, config.dimensions, config.tie_eps)
    held_out = place.startswith("data.held_out")
    by_score = not held_out and (config.loss == "regression" or config.pairs == "all")
    ties = not held_out and (config.loss == "btt" or (config.loss == "bt" and config.ties == "half"))
    check_examples(examples, config.dimensions, place, by_score, ties)
    return examples


def evaluate(run: Run, iteration: int) -> dict[str, float]:
    """How many of the held-out pairs are ranked as they are labelled, ties left out."""
    shares, loss = ranked(run, run.given.chosen("held_out", chosen))
    return {**{f"eval/accuracy/{name}": share for name, share in shares.items()}, "eval/loss": loss}


def described(run: Run, held_out: Sequence[Example]) -> Description:
    """The iteration of the weights in use, and how their scores of held-out clips are spread."""
    best = peak(run) if best_weights(run) else None
    return Description(best.iteration if best else run.completed, measured(run, held_out))
