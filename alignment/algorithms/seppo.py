"""SePPO (arXiv 2410.05255): the videos of a data set against samples of earlier checkpoints of the policy itself.

Only good videos are needed. An earlier checkpoint, drawn anew every iteration from those kept so far, samples a rival
for each; it is the reference of the pair, too. Where the policy already fits the video better than that checkpoint did,
the rival is a loser, as in Flow-DPO; where it fits it worse, the rival is pulled up along with it (`lowest: -1`), or
left out (`lowest: 0`).

    paper, images     7 checkpoints, one every 30 updates

Of a given pair the better video counts, of a scored group the best, of a group without scores every one.

Differs from the paper: the orientation of the sign is that of its figures and reviews, its code is not public; where
the error did not change, as for a reference that is the policy itself, the sign is 0. Beta is not known.

Logs: as flow_dpo, with the rivals as losers; sign (mean), reference/age (updates since the checkpoint).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from samplers import seed_for

from ..config import Recipe
from ..data import Stream
from ..preference import Batch, Example, MatchingConfig, batches, check_matching, watch_pairs
from ..preference_losses import anchor_sign, margins, seppo_loss
from ..samples import Plan, sample_groups
from ..tally import Tally
from ..training import Run
from ..weighted import Video
from ..weighted import to_imitate as chosen


@dataclass
class Config(MatchingConfig):
    beta: float = 500.0  # strength of the pull towards the reference
    lowest: int = -1  # the least sign of a rival: -1 pulls it up where the policy is behind, 0 leaves it out
    checkpoints: int = 7  # that references are drawn from, the latest ones
    keep_every: int = 30  # iterations between two of them; the first is the base model
    dimension: str | None = None  # of the scores or labels, by which videos are chosen


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = check_matching(recipe, processes)
    if recipe.data.preferences is None:
        wrong.insert(0, "algorithm.name: seppo learns from given videos; name data.preferences")
    if recipe.data.held_out is not None:
        wrong.append("data.held_out: rivals change all the time; leave it out")
    if config.beta <= 0 or config.checkpoints < 1 or config.keep_every < 1:
        wrong.append("algorithm: beta, checkpoints and keep_every have to be above 0")
    if config.lowest not in (-1, 0):
        wrong.append(f"algorithm.lowest: {config.lowest} is neither -1 nor 0")
    if config.batch_size % processes:
        wrong.append(f"algorithm.batch_size: {config.batch_size} cannot be dealt to {processes} processes")
    return wrong


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return False


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    config: Config = run.recipe.algorithm
    stream = Stream(run.given.chosen("preferences", chosen), run.recipe.seed, run.recipe.data.shuffle)
    for iteration in run.iterations():
        keep_checkpoint(run)
        name, age = draw_reference(run)
        start = (iteration - 1) * config.batch_size
        taken = run.processes.share(list(enumerate(stream.take(start, config.batch_size), start)))
        with run.timer("rollout"), run.policy.using(run.snapshot(name)):
            examples = with_rivals(run, taken)
        tally = Tally()
        with run.timer("update"):
            update(run, examples, name, tally)
        run.log({**tally.metrics(run), "reference/age": age})


def keep_checkpoint(run: Run) -> None:
    """Every `keep_every` iterations, the policy as it is before this one, in place of the oldest."""
    config: Config = run.recipe.algorithm
    number, rest = divmod(run.iteration - 1, config.keep_every)
    if rest == 0:
        run.snapshot(f"checkpoint_{number}", renew=True)
        run.snapshots.pop(f"checkpoint_{number - config.checkpoints}", None)


def draw_reference(run: Run) -> tuple[str, int]:
    """One of the kept checkpoints, each as likely as the others, and how many iterations ago it was the policy."""
    config: Config = run.recipe.algorithm
    newest = (run.iteration - 1) // config.keep_every
    oldest = max(0, newest - config.checkpoints + 1)
    number = random.Random(seed_for(run.recipe.seed, "reference", run.iteration)).randint(oldest, newest)
    return f"checkpoint_{number}", run.iteration - 1 - number * config.keep_every


def with_rivals(run: Run, videos: Sequence[tuple[int, Video]]) -> list[Example]:
    """(position in the stream, video) with a sample of the policy in use for each."""
    prompts = [(position, video.prompt) for position, video in videos]
    plan = Plan(stochastic=(), recorded=(run.recipe.sampler.steps - 1,))
    samples, _ = sample_groups(run, prompts, 1, lambda position: plan)
    rivals: dict[int, Tensor] = {}
    for rows, trajectory in samples.batches(None):
        rivals |= dict(zip(rows, trajectory.steps[-1].x_next, strict=True))

    def pair(row: int, video: Video) -> tuple[Tensor, None]:
        return torch.stack([run.given.load(video.member)[0], rivals[row]]), None

    return [
        Example(video.prompt, seed_for(run.recipe.seed, "video", at), lambda row=row, video=video: pair(row, video))
        for row, (at, video) in enumerate(videos)
    ]


def update(run: Run, examples: Sequence[Example], name: str, tally: Tally) -> None:
    """One optimiser step on this process's videos and their rivals, against the checkpoint of this name."""
    config: Config = run.recipe.algorithm
    count = run.processes.total(len(examples))
    for batch in batches(run, examples):
        reference = batch.errors_under(run.policy.using(run.snapshot(name)))

        def visit(errors: Tensor, batch: Batch = batch, reference: Tensor = reference) -> None:
            both = errors[:, 0], errors[:, 1], reference[:, 0], reference[:, 1]
            losses = seppo_loss(*both, config.beta, config.lowest)
            watch_pairs(tally, margins(errors, reference, config.beta).detach(), errors, reference, batch.levels)
            tally.add("sign", anchor_sign(errors[:, 0], reference[:, 0], config.lowest))
            tally.add("loss", losses)
            (losses.sum() / count).backward()

        batch.visit(visit)
    run.apply_update()
