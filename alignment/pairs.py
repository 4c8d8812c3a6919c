"""Pairs to learn from, whether they were given or are sampled by the policy, and the update that all pair losses share.

P pairs of a micro-batch, F latent frames; the first member of a pair is the better one, unless frames are labelled
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from samplers import seed_for

from .config import Recipe
from .data import Group, Pair, Stream, decided, has_noise, score_of
from .errors import Problems
from .noised import check_clean
from .preference import NOISES, Batch, Example, MatchingConfig, batches, check_matching
from .samples import Plan, sample_groups
from .tally import Tally

if TYPE_CHECKING:
    from .training import Run

PairLoss = Callable[[Tensor, Tensor, Batch], Tensor]  # errors and reference (P, 2), the batch -> losses to be averaged
REFERENCE = "reference"  # the snapshot, where the reference is renewed
DRAWS = 4  # levels and noises that a held-out pair is seen at


@dataclass
class PairConfig(MatchingConfig):
    beta: float = 500.0  # strength of the pull towards the reference, for errors averaged over a sample's elements
    noise: str = "shared"  # of a pair: shared, independent, or own (the one that each member was generated from)
    anchor: float = 0.0  # weight of the better member's own error, which keeps the policy from forgetting it
    dimension: str | None = None  # of the scores or labels, that decides which member is better; None: the pair's label
    tie_eps: float = 0.0  # scores that are no further apart are a tie, which is left out
    renew_reference: int = 0  # iterations after which the policy becomes the reference; 0: never
    max_winner_error: float | None = None  # error of the better members over the reference's that ends the run
    # Where data.prompts are named, each iteration samples its pairs, the best and the worst of a group:
    prompts_per_iteration: int = 8  # over all processes
    group_size: int = 4  # samples a prompt
    updates_per_rollout: int = 4  # each on all pairs, at new levels and with new noise


class Compared(NamedTuple):
    """A given pair, and how it is to be learned from."""

    pair: Pair
    weight: float = 1.0
    gap: float = 0.0
    labels: tuple[float, ...] | None = None  # by latent frame, or by dimension


def check_pairs(recipe: Recipe, processes: int) -> list[str]:
    """What is wrong with the shared settings, one line each."""
    config: PairConfig = recipe.algorithm
    wrong = check_matching(recipe, processes)
    if config.noise not in NOISES:
        wrong.append(f"algorithm.noise: {config.noise!r} is none of {', '.join(NOISES)}")
    for key in ("beta", "anchor", "tie_eps", "renew_reference"):
        if getattr(config, key) < 0:
            wrong.append(f"algorithm.{key}: {getattr(config, key)} is below 0")
    if config.max_winner_error is not None and config.max_winner_error <= 1:
        wrong.append(f"algorithm.max_winner_error: {config.max_winner_error}; the reference's own error is 1, as 1.02")
    if recipe.data.preferences is None:
        wrong += check_clean(recipe)
        if config.group_size < 2:
            wrong.append(f"algorithm.group_size: {config.group_size} makes no pair; use 2 or more")
        if config.prompts_per_iteration < 1 or config.prompts_per_iteration % processes:
            wrong.append(
                f"algorithm.prompts_per_iteration: {config.prompts_per_iteration} cannot be dealt to {processes} "
                "processes"
            )
        if config.updates_per_rollout < 1:
            wrong.append(f"algorithm.updates_per_rollout: {config.updates_per_rollout} is below 1")
    return wrong


def decided_pairs(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[Pair]:
    """Without ties, the better member first.

    Args:
        place: where the records are from, for messages.
    Raises: UserError where ties are all that is there; Problems for pairs that lack the noise that they are to share.
    """
    config: PairConfig = recipe.algorithm
    pairs = decided(records, config.dimension, config.tie_eps, place)
    check_noises(recipe, pairs, place)
    return pairs


def check_noises(recipe: Recipe, pairs: Sequence[Pair], place: str) -> None:
    """Raises: Problems, one line for each pair that does not say what noise it was made from, where that counts."""
    if recipe.algorithm.noise == "own":
        raise_for(
            f'{place} line {pair.line}: has no "noise" in the latents of both videos, as alignment.generate writes it; '
            "set algorithm.noise to shared"
            for pair in pairs
            if not all(member.latent and has_noise(member.latent) for member in pair.members)
        )


def check_scores(pairs: Sequence[Pair], dimension: str | None, place: str) -> None:
    """Raises: Problems, one line for each decided pair that has no scores, or lower ones for the better member."""
    problems = []
    for pair in pairs:
        scores, of = score_of(pair, dimension), f" by {dimension}" if dimension else ""
        if scores is None:
            problems.append(f"{place} line {pair.line}: has no scores{of}; annotate it with a reward")
        elif scores[0] < scores[1]:
            problems.append(
                f"{place} line {pair.line}: scores{of}, {scores[0]:g} of the better one and {scores[1]:g}, contradict "
                "the label; leave it out, or name another algorithm.dimension"
            )
    raise_for(problems)


def raise_for(problems: Iterable[str]) -> None:
    """Raises: Problems where there are any."""
    if found := list(problems):
        raise Problems(found)


def given_examples(run: Run, compared: Sequence[Compared]) -> Callable[[], Iterator[list[Example]]]:
    """Updates of an iteration over given pairs: one, on this process's share of the next `batch_size`."""
    config: PairConfig = run.recipe.algorithm
    stream = Stream(compared, run.recipe.seed, run.recipe.data.shuffle)

    def updates() -> Iterator[list[Example]]:
        start = (run.iteration - 1) * config.batch_size
        taken = list(enumerate(stream.take(start, config.batch_size), start))
        yield [example_of(run, item, seed_for(run.recipe.seed, "pair", at)) for at, item in run.processes.share(taken)]

    return updates


def sampled_examples(run: Run, weigh: Callable[[float, float], float] | None = None) -> Iterator[list[Example]]:
    """Updates of an iteration over pairs that the policy samples now: the best and the worst of each group.

    Args:
        weigh: from the rewards of the better and the worse one to the pair's weight.
    """
    config: PairConfig = run.recipe.algorithm
    size, last = config.group_size, run.recipe.sampler.steps - 1
    recorded = (0, last) if config.noise == "own" and last else (last,)
    prompts = run.next_prompts(config.prompts_per_iteration)
    with run.timer("rollout"):
        samples, videos = sample_groups(run, prompts, size, lambda position: Plan((), recorded))
    readings = run.score(videos, samples.prompts, samples.groups, size)
    del videos  # at full size a group of them weighs more than the model
    total = run.scorer.combined(readings.totals)
    spread = float(total[total.isfinite()].std(correction=0)) or 1.0
    rewards = total.view(-1, size)[run.processes.rank :: run.processes.count]
    states: dict[int, tuple[Tensor, Tensor]] = {}
    for rows, trajectory in samples.batches(None):
        first, final = trajectory.steps[0], trajectory.steps[-1]
        states |= {row: (final.x_next[i], first.x[i]) for i, row in enumerate(rows)}
    pairs = []
    for group, values in enumerate(rewards.tolist()):
        known = [i for i, value in enumerate(values) if math.isfinite(value)]
        if not known:
            continue
        best, worst = max(known, key=values.__getitem__), min(known, key=values.__getitem__)
        if values[best] - values[worst] > config.tie_eps:
            members = [states[group * size + best], states[group * size + worst]]
            weight = weigh(values[best], values[worst]) if weigh else 1.0
            gap = (values[best] - values[worst]) / spread
            pairs.append((group, [torch.stack(tensors) for tensors in zip(*members, strict=True)], weight, gap))
    run.log({"pairs": run.processes.total(len(pairs)), "pairs/tied": 1 - _share(run, len(pairs), len(rewards))})
    for number in range(config.updates_per_rollout):
        yield [
            Example(
                samples.prompts[group * size],
                seed_for(run.recipe.seed, "pair", run.iteration, samples.groups[group * size], number),
                lambda loaded=loaded: loaded,
                weight,
                gap,
            )
            for group, loaded, weight, gap in pairs
        ]


def update(
    run: Run,
    examples: Sequence[Example],
    loss: PairLoss,
    tally: Tally,
    count: float | None = None,
    frame_of: Tensor | None = None,
) -> None:
    """One optimiser step on this process's pairs.

    Args:
        loss: gives the losses of a micro-batch, whose sum over all micro-batches and processes is divided by `count`.
        count: None: the number of pairs.
        frame_of: see `batches`.
    """
    config: PairConfig = run.recipe.algorithm
    pairs = run.processes.total(len(examples))
    count = pairs if count is None else count
    if count == 0:
        return
    with run.timer("update"):
        for batch in batches(run, examples, config.noise, frame_of):
            reference = batch.errors_under(reference_weights(run))

            def visit(errors: Tensor, batch: Batch = batch, reference: Tensor = reference) -> None:
                losses = loss(errors, reference, batch)
                tally.add("loss", losses * (pairs / count))  # whose mean over pairs is the loss
                (losses.sum() / count).backward()

            batch.visit(visit)
        run.apply_update()


def reference_weights(run: Run) -> AbstractContextManager[None]:
    """The policy as the reference: the base, or where it is renewed the policy of some iterations ago."""
    if run.recipe.algorithm.renew_reference:
        return run.policy.using(run.snapshot(REFERENCE))
    return run.policy.reference()


def close_iteration(run: Run, tally: Tally) -> None:
    """Log the iteration, renew the reference when it is due, and end a run whose better members drift away."""
    config: PairConfig = run.recipe.algorithm
    found = tally.metrics(run)
    run.log(found)
    if config.renew_reference and run.iteration % config.renew_reference == 0:
        run.snapshot(REFERENCE, renew=True)
    limit = config.max_winner_error
    if limit and found.get("error/winner", 0.0) > limit:
        run.end(
            f"the better members' error is {found['error/winner']:.4f} times the reference's (max_winner_error is "
            f"{limit}): the run ends; a lower optimizer.lr, a larger beta or an anchor holds them"
        )


def watch_held_out(
    run: Run,
    compared: Sequence[Compared],
    watch: Callable[[Tally, Tensor, Tensor, Batch], None],
    frame_of: Tensor | None = None,
) -> None:
    """Let evaluations say how many of these pairs the policy tells apart, each at some fixed levels and noises.

    Args:
        watch: notes the errors and the reference of a batch.
    """
    seed = run.recipe.evaluation.seed
    examples = [
        example_of(run, item, seed_for(seed, "held-out", item.pair.id, draw))
        for item in run.processes.share(list(compared))
        for draw in range(DRAWS)
    ]

    def evaluated() -> dict[str, float]:
        tally = Tally()
        for batch in batches(run, examples, run.recipe.algorithm.noise, frame_of):
            reference = batch.errors_under(reference_weights(run))
            watch(tally, batch.errors_under(nullcontext()), reference, batch)
        return {f"eval/pairs/{name}": value for name, value in tally.metrics(run).items()}

    if compared:
        run.also_evaluated = evaluated


def example_of(run: Run, item: Compared, seed: int, level: float | None = None) -> Example:
    """A given pair at the noise of this seed, and at this level unless it is to be drawn."""
    pair = item.pair

    def load() -> tuple[Tensor, Tensor | None]:
        states, noises = zip(*(run.given.load(member) for member in (pair.a, pair.b)), strict=True)
        return torch.stack(states), None if any(noise is None for noise in noises) else torch.stack(noises)

    return Example(pair.prompt, seed, load, item.weight, item.gap, item.labels, level)


def _share(run: Run, some: int, of: int) -> float:
    return run.processes.total(some) / run.processes.total(of)
