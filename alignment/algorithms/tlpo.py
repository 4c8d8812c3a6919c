"""TLPO (FantasyTalking2, arXiv 2508.11255), second stage: a gate weighs experts by timestep and layer.

    stage 1    a LoRA for each dimension: a run of flow_dpo on the pairs of that dimension (`algorithm.dimension: VQ`),
               or for its reward; each run's lora/ is an expert
    stage 2    this file: the experts are frozen, and a gate learns, by Flow-DPO on the pairs of all dimensions,
                   W = W0 + sum_i w_i B_i A_i,    w = softmax over experts of an MLP on (timestep, layer)

The gate begins with equal weights, and the reference is that mixture, not the base model: the loss starts at log 2.
Adapters are the experts' own, so model.lora is not looked at. What a run leaves: see experts.py.

Differs from the paper, of which an abstract and summaries were at hand, but no code and not the gate's formula: that a
softmax over an MLP of embeddings of timestep and layer weighs the experts is second-hand, and sizes are ours. So is
what counts as a layer: every adapted linear map or convolution has an embedding of its own. Rewards in place of a
dimension's labels, and pairs that the fused policy samples itself (data.prompts), are options that the paper has not.

Logs: those of flow_dpo, and gate/<expert> (its weight, mean over the timesteps of sampling and over layers),
gate/spread (standard deviation of a weight over timesteps and layers; at 0 lora/ is all that was learned).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import Recipe
from ..data import Group, Pair, decided
from ..experts import GatedPolicy, Shapes, check_expert, count_gates, expert_folder
from ..pairs import (
    Compared,
    PairConfig,
    check_noises,
    check_pairs,
    close_iteration,
    given_examples,
    sampled_examples,
    update,
    watch_held_out,
)
from ..preference import Batch, watch_pairs
from ..preference_losses import dpo_loss, margins
from ..tally import Tally
from ..training import Run


@dataclass
class Config(PairConfig):
    experts: dict[str, str] = field(default_factory=dict)  # name: folder of a run, or of a LoRA
    width: int = 64  # of the gate's embeddings and of its hidden layer
    dimensions: list[str] = field(default_factory=list)  # each compares a pair by itself; none: see `dimension`


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = check_pairs(recipe, processes)
    if len(config.experts) < 2:
        wrong.append(f"algorithm.experts: a gate needs two or more to choose from, not {len(config.experts)}")
    for name, path in config.experts.items():
        if not re.fullmatch(r"\w+", name):
            wrong.append(f"algorithm.experts: {name!r} is no name; use letters, digits and _")
        if not expert_folder(path).is_dir():
            wrong.append(f"algorithm.experts.{name}: no such folder: {path}; name that of a finished run, or of a LoRA")
    if recipe.model.trained != "lora":
        wrong.append("model.trained: tlpo trains a gate over LoRAs; leave it at lora")
    if config.width < 2 or config.width % 2:
        wrong.append(f"algorithm.width: {config.width} is not an even number above 0")
    if config.dimensions and config.dimension:
        wrong.append("algorithm.dimension: algorithm.dimensions says by what pairs are compared; leave it out")
    if config.dimensions and recipe.data.preferences is None:
        wrong.append("algorithm.dimensions: are of given pairs; name data.preferences, or leave them out")
    return wrong


def count_weights(recipe: Recipe, pipeline: type, shapes: dict[str, Shapes]) -> tuple[int, int, int]:
    """Numbers of trained weights, of frozen ones in experts, and of adapted layers. Raises: UserError, see experts.

    Args:
        shapes: of the weights of each denoiser's layers.
    """
    config: Config = recipe.algorithm
    found = [check_expert(pipeline, name, expert_folder(path), shapes) for name, path in config.experts.items()]
    return count_gates(found, config.width)


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand; a gate's always are."""
    return False


def make_policy(pipe: Any, recipe: Recipe, device: torch.device) -> GatedPolicy:
    """What is trained here: the gate, in place of adapters."""
    config: Config = recipe.algorithm
    options = {"experts": config.experts, "width": config.width}
    return GatedPolicy(pipe, recipe.model, recipe.sampler, recipe.call, device, **options)


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    policy: GatedPolicy = run.policy
    policy.find_timesteps(run.stream.prompts[0], run.recipe.evaluation.steps)
    watch_held_out(run, run.given.chosen("held_out", chosen), partial(watch, run))
    given = run.given.chosen("preferences", chosen)
    updates = given_examples(run, given) if given else partial(sampled_examples, run)
    for _ in run.iterations():
        tally = Tally()
        for examples in updates():
            update(run, examples, partial(losses, run, tally), tally)
        close_iteration(run, tally)
        run.log(gate_metrics(policy))


def chosen(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[Compared]:
    """The decided pairs, once for each dimension. Raises: UserError where a dimension decides none."""
    config: Config = recipe.algorithm
    dimensions = config.dimensions or [config.dimension]
    pairs = [pair for dimension in dimensions for pair in decided(records, dimension, config.tie_eps, place)]
    check_noises(recipe, pairs, place)
    return [Compared(pair) for pair in pairs]


def losses(run: Run, tally: Tally, errors: Tensor, reference: Tensor, batch: Batch) -> Tensor:
    """(P,) of Flow-DPO; errors and reference (P, 2)."""
    watch(run, tally, errors, reference, batch)
    return (
        batch.weights * dpo_loss(margins(errors, reference, run.recipe.algorithm.beta))
        + run.recipe.algorithm.anchor * errors[:, 0]
    )


def watch(run: Run, tally: Tally, errors: Tensor, reference: Tensor, batch: Batch) -> None:
    """Note how the policy tells these pairs apart."""
    watch_pairs(tally, margins(errors, reference, run.recipe.algorithm.beta), errors, reference, batch.levels)


def gate_metrics(policy: GatedPolicy) -> dict[str, float]:
    """How much of each expert the samples have, and how far that depends on timestep and layer."""
    shares = torch.cat([found.flatten(0, 1) for found in policy.shares().values()])  # (all T and L, K)
    found = {f"gate/{name}": float(mean) for name, mean in zip(policy.experts, shares.mean(0), strict=True)}
    return {**found, "gate/spread": float(shares.std(0, correction=0).mean())}
