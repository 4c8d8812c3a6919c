"""A reward on noised latents: the first blocks of the video transformer and a head, trained on pairs.

It scores what a sampler holds half way, without a decoder: what guidance by reward needs (Flow-NRG of VideoAlign, arXiv
2501.13918), and training on rewards of intermediate states (PRFL, arXiv 2511.21541). Both members of a pair are noised
to one level with one noise, so that all that tells them apart is theirs. The loss is Bradley-Terry's, for each
dimension by itself, or its variant with ties (`theta`).

    Flow-NRG    first layers of a 1B model, in full, Adam 5e-6, 144 pairs an update, 2 epochs
    PRFL        the first 8 blocks of Wan2.1-14B, one learned query with 8 heads, an MLP of 1024 and 512; in its code
                blocks in full, embeddings frozen, cross-entropy on labels of single videos, or pairs as here

The head has a query for each dimension, and is told the level. Here pairs are all there is to learn from: labels of
single videos are not. What a run leaves: see latent_reward/model.py.

Logs: loss, accuracy (share of decided pairs ranked right, at drawn levels), accuracy/<dimension>, difference (size of
the difference of scores), labels (that the update learned from). Evaluations: eval/accuracy/mean,
eval/accuracy/<dimension>, eval/accuracy/levels_<low>_<high> with /low and /high, Wilson's 95 % interval over pairs, and
eval/accuracy/<dimension>/levels_<low>_<high>, on data.held_out, every pair once in each quarter of the levels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from samplers import seed_for

from ..config import Recipe
from ..data import Group, Pair, conditions
from ..latent_reward import Design, LatentReward
from ..latent_reward.pairs import OVERALL, Share, counted, labelled, preference_losses, ranked_right, share
from ..latent_reward.sizes import Shapes, count
from ..pairs import Compared, example_of, given_examples
from ..preference import BUCKETS, Batch, Example, MatchingConfig, batches, check_matching
from ..samples import chunks
from ..tally import Tally
from ..training import Run


@dataclass
class Config(MatchingConfig):
    layer: int = 8  # how many blocks of the transformer run
    dimensions: list[str] = field(default_factory=list)  # labels or scores of the pairs; none: a pair's one label
    theta: float | None = None  # of Bradley-Terry with ties, as 5; None: ties are left out
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
    if len(set(config.dimensions)) < len(config.dimensions) or {"mean", OVERALL} & set(config.dimensions):
        wrong.append(f"algorithm.dimensions: {config.dimensions} are not different names other than mean and {OVERALL}")
    if config.theta is not None and config.theta <= 1:
        wrong.append(f"algorithm.theta: {config.theta} leaves no room for ties; it is above 1, as 5, or null")
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
    return Design(config.layer, tuple(config.dimensions or [OVERALL]), config.frozen, recipe.fps)


def chosen(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[Compared]:
    """All pairs with their labels. Raises: UserError for a dimension that decides none."""
    config: Config = recipe.algorithm
    found = labelled(records, config.dimensions, config.tie_eps, place)
    return [Compared(pair, labels=labels) for pair, labels in found]


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    updates = given_examples(run, run.given.chosen("preferences", chosen))
    for _ in run.iterations():
        tally = Tally()
        for examples in updates():
            update(run, examples, tally)
        run.log(tally.metrics(run))


def update(run: Run, examples: Sequence[Example], tally: Tally) -> None:
    """One optimiser step on this process's pairs: the mean loss over all labels that there are to learn from."""
    theta = run.recipe.algorithm.theta
    labels = torch.tensor([example.labels for example in examples])
    total = run.processes.total(int(counted(labels, theta).sum()))
    run.log({"labels": total})
    if total == 0:
        return
    with run.timer("update"):
        for batch in batches(run, examples):
            difference = differences(run, batch)
            losses = preference_losses(difference, batch.labels, theta)
            (losses.sum() / total).backward()
            watch(run, tally, difference, losses, batch)
        run.apply_update()


def differences(run: Run, batch: Batch) -> Tensor:
    """(P, D) scores of the first members minus those of the second, at one level and noise."""
    texts = [prompt.text for prompt in batch.prompts]
    call = {**conditions(batch.prompts), **run.recipe.algorithm.call}
    first, second = run.policy.scores(batch.trajectory, texts, **call).unflatten(0, (-1, 2)).unbind(1)
    return first - second


def watch(run: Run, tally: Tally, difference: Tensor, losses: Tensor, batch: Batch) -> None:
    """Note what the loss learned from, and how the pairs are ranked."""
    tally.add("loss", losses[counted(batch.labels, run.recipe.algorithm.theta)])
    tally.add("difference", difference.abs().flatten())
    right = ranked_right(difference, batch.labels)
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
        levels = f"levels_{bucket / BUCKETS:.2f}_{(bucket + 1) / BUCKETS:.2f}"
        of_all: Share = share(found[:, bucket].nanmean(1))
        metrics[f"eval/accuracy/{levels}"] = of_all.mean
        metrics[f"eval/accuracy/{levels}/low"], metrics[f"eval/accuracy/{levels}/high"] = of_all.low, of_all.high
        for d, name in enumerate(names):
            metrics[f"eval/accuracy/{name}/{levels}"] = float(found[:, bucket, d].nanmean())
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
    parts = chunks(examples, run.recipe.algorithm.batch_size)  # all at once would be more than an update ever is
    right = [ranked_right(differences(run, b), b.labels) for part in parts for b in batches(run, part)]
    return torch.cat(right).unflatten(0, (-1, BUCKETS))
