"""A reward on noised latents: the first blocks of the video transformer and a head, trained on pairs.

It scores what a sampler holds half way, without a decoder: what guidance by reward needs (Flow-NRG of VideoAlign, arXiv
2501.13918), and training on rewards of intermediate states (PRFL, arXiv 2511.21541). Both members of a pair are noised
to one level with one noise, so that all that tells them apart is theirs. The loss is Bradley-Terry's, for each
dimension by itself (loss bt), or its variant with ties (btt). The mean is over all cells, pairs times dimensions,
those without a label included, so that every label weighs the same.

    Flow-NRG    first layers of a 1B model, in full, Adam 5e-6, 144 pairs an update, 2 epochs
    PRFL        the first 8 blocks of Wan2.1-14B, one learned query with 8 heads, an MLP of 1024 and 512; in its code
                blocks in full, embeddings frozen, cross-entropy on labels of single videos, or pairs as here

The head has a query for each dimension, and is told the level. Here pairs are all there is to learn from: labels of
single videos are not. What a run leaves: see latent_reward/model.py.

Logs: loss, accuracy (share of decided pairs ranked right, at drawn levels), accuracy/<dimension>, difference (size of
the difference of scores). Evaluations, on data.held_out, every pair once in each quarter of the levels:
eval/accuracy/mean, eval/accuracy/<dimension>, eval/levels_<low>_<high>/<dimension> and eval/levels_<low>_<high>/mean
with /low and /high, Wilson's 95 % interval over pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samplers import seed_for

from ..config import Recipe
from ..data import Group, Pair, conditions, pair_of
from ..errors import UserError
from ..latent_reward import Design, LatentReward
from ..latent_reward.accuracy import share
from ..latent_reward.sizes import Shapes, count
from ..pairs import Compared, example_of, given_examples
from ..preference import BUCKETS, Batch, Example, MatchingConfig, batches, check_matching
from ..reward_training.data import OVERALL, examples_of
from ..reward_training.losses import TIES, comparison_cells, ranked_right
from ..samples import chunks
from ..tally import Tally
from ..training import Run

LOSSES = ("bt", "btt")


@dataclass
class Config(MatchingConfig):
    layer: int = 8  # how many blocks of the transformer run
    dimensions: list[str] = field(default_factory=lambda: [OVERALL])  # labels or scores; Overall: the pair's own label
    loss: str = "bt"  # or btt
    theta: float = 5.0  # of btt: above 1, more makes more ties
    ties: str = "skip"  # of bt: or half, a tie is half a win of either
    tie_eps: float = 0.0  # scores that are no further apart are a tie
    frozen: bool = False  # train the head alone
    head_lr: float | None = None  # of the head, which starts from nothing; None: optimizer.lr


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = check_matching(recipe, processes)
    if recipe.data.preferences is None:
        wrong.append("data.preferences: a reward learns from given pairs; name a file of them, not data.prompts")
    if recipe.data.held_out is None:
        wrong.append("data.held_out: that a reward is right on pairs that it has learned says nothing; name others")
    if not config.dimensions or len(set(config.dimensions)) < len(config.dimensions) or "mean" in config.dimensions:
        wrong.append(f"algorithm.dimensions: {config.dimensions} is not one or more names, each once, other than mean")
    for key, choices in (("loss", LOSSES), ("ties", TIES)):
        if getattr(config, key) not in choices:
            wrong.append(f"algorithm.{key}: {getattr(config, key)!r} is none of {', '.join(choices)}")
    if config.theta <= 1:
        wrong.append(f"algorithm.theta: {config.theta} is not above 1")
    if config.tie_eps < 0:
        wrong.append(f"algorithm.tie_eps: {config.tie_eps} is below 0")
    if config.head_lr is not None and config.head_lr <= 0:
        wrong.append(f"algorithm.head_lr: {config.head_lr} is not above 0")
    return wrong


def count_weights(recipe: Recipe, pipeline: type, shapes: dict[str, Shapes]) -> tuple[int, int, int]:
    """Numbers of trained weights, of frozen ones that are not in the model, and of adapted layers.

    Raises: UserError for a layer that the transformer has not, see `count`.
    """
    return count(recipe.model, design(recipe), shapes)


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return False


def learning_rates(recipe: Recipe, parameters: dict[str, Any]) -> dict[str, float]:
    """The head's own rate, where it has one."""
    rate = recipe.algorithm.head_lr
    return {name: rate for name in parameters if name.startswith("head.")} if rate else {}


def make_policy(pipe: Any, recipe: Recipe, device: torch.device) -> LatentReward:
    """What is trained here, in place of a generator."""
    call = {**recipe.call, **recipe.algorithm.call}
    return LatentReward(pipe, recipe.model, recipe.sampler, call, device, design=design(recipe))


def design(recipe: Recipe) -> Design:
    """Of the recipe's reward."""
    config: Config = recipe.algorithm
    return Design(config.layer, tuple(config.dimensions), config.frozen, recipe.fps)


def chosen(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[Compared]:
    """All pairs with their labels; of a group every two videos.

    Raises: UserError for a dimension of which no pair is decided.
    """
    config: Config = recipe.algorithm
    found = []
    for example in examples_of(records, config.dimensions, config.tie_eps):
        record = example.record
        for (i, j), labels in zip(example.compared, example.labels, strict=True):
            if any(map(math.isfinite, labels)):
                pair = record if isinstance(record, Pair) else pair_of(record, i, j)
                found.append(Compared(pair, labels=labels))
    for column, name in enumerate(config.dimensions):
        if not any(item.labels[column] in (1, -1) for item in found):
            raise UserError(f"{place}: no pair is decided by {name}; annotate them, or change algorithm.dimensions")
    return found


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    updates = given_examples(run, run.given.chosen("preferences", chosen))
    for _ in run.iterations():
        tally = Tally()
        for examples in updates():
            update(run, examples, tally)
        run.log(tally.metrics(run))


def update(run: Run, examples: Sequence[Example], tally: Tally) -> None:
    """One optimiser step on this process's pairs."""
    config: Config = run.recipe.algorithm
    pairs = run.processes.total(len(examples))
    with run.timer("update"):
        for batch in batches(run, examples):
            difference = differences(run, batch)
            losses = comparison_cells(difference, batch.labels, config.loss, config.theta, config.ties).mean(1)
            (losses.sum() / pairs).backward()
            tally.add("loss", losses)
            watch(run, tally, difference, batch.labels)
        run.apply_update()


def differences(run: Run, batch: Batch) -> Tensor:
    """(P, D) scores of the first members minus those of the second, at one level and noise."""
    texts = [prompt.text for prompt in batch.prompts]
    call = {**conditions(batch.prompts), **run.recipe.algorithm.call}
    first, second = run.policy.scores(batch.trajectory, texts, **call).unflatten(0, (-1, 2)).unbind(1)
    return first - second


def watch(run: Run, tally: Tally, difference: Tensor, labels: Tensor) -> None:
    """Note how the pairs are ranked."""
    tally.add("difference", difference.abs().flatten())
    right = ranked_right(difference.detach(), labels)
    tally.add("accuracy", right[~right.isnan()])
    for name, column in zip(run.policy.dimensions, right.unbind(1), strict=True):
        tally.add(f"accuracy/{name}", column[~column.isnan()])


def evaluate(run: Run, iteration: int) -> dict[str, float]:
    """How many of the held-out pairs are ranked right, by dimension and noise level."""
    found = run.processes.gather(held_out(run, run.given.chosen("held_out", chosen)))
    names, metrics = run.policy.dimensions, {"eval/accuracy/mean": float(found.nanmean())}
    for d, name in enumerate(names):
        metrics[f"eval/accuracy/{name}"] = float(found[:, :, d].nanmean())
    for bucket in range(BUCKETS):
        levels = f"eval/levels_{bucket / BUCKETS:.2f}_{(bucket + 1) / BUCKETS:.2f}"
        of_all = share(found[:, bucket].nanmean(1))
        metrics |= {f"{levels}/mean": of_all.mean, f"{levels}/mean/low": of_all.low, f"{levels}/mean/high": of_all.high}
        metrics |= {f"{levels}/{name}": float(found[:, bucket, d].nanmean()) for d, name in enumerate(names)}
    return metrics


@torch.no_grad()
def held_out(run: Run, pairs: Sequence[Compared]) -> Tensor:
    """(N, BUCKETS, D) of this process's share: whether a pair is ranked right at a level in each bucket."""
    examples = []
    for item in run.processes.share(list(pairs)):
        for bucket in range(BUCKETS):
            seed = seed_for(run.recipe.evaluation.seed, "held-out", item.pair.id, bucket)
            within = torch.rand((), generator=torch.Generator().manual_seed(seed_for(seed, "level"))).item()
            examples.append(example_of(run, item, seed, (bucket + 1 - within) / BUCKETS))
    found = [torch.zeros(0, len(run.policy.dimensions), device=run.policy.device)]
    for part in chunks(examples, run.recipe.algorithm.batch_size):  # all at once would be more than an update ever is
        found += [ranked_right(differences(run, batch), batch.labels) for batch in batches(run, part)]
    return torch.cat(found).view(len(examples) // BUCKETS, BUCKETS, len(run.policy.dimensions))
