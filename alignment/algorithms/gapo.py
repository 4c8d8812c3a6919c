"""GAPO (AniSora, arXiv 2504.10044): Flow-DPO in which a pair counts by how far its scores lie apart.

A pair's loss is weighted with base^better - base^worse of its members' scores in [0, 1]: 1 at the widest gap, 0 for a
tie, and among equal gaps more where both are good. Scores are brought to [0, 1] by `score_range`.

    released code, CogVideoX of 5B with v-prediction     beta 5000, base 2, scores of 0 to 100

Differs from the released code: it averages the losses before it multiplies them with the weights, which is right for
one pair a batch only; here each pair has its own weight. Pairs come as in Flow-DPO, given or sampled by the policy.

Logs: as flow_dpo, and weight (mean of the pairs').
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from ..config import Recipe
from ..data import Group, Pair, score_of
from ..errors import UserError
from ..pairs import (
    Compared,
    PairConfig,
    check_pairs,
    check_scores,
    close_iteration,
    decided_pairs,
    given_examples,
    sampled_examples,
    update,
    watch_held_out,
)
from ..preference import Batch, watch_pairs
from ..preference_losses import dpo_loss, gap_weight, margins
from ..tally import Tally
from ..training import Run


@dataclass
class Config(PairConfig):
    score_range: list[float] = field(default_factory=lambda: [0.0, 1.0])  # what scores are 0 and 1; beyond: the ends
    base: float = 2.0  # of the weight; more favours pairs of which one is very good


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = check_pairs(recipe, processes)
    if len(config.score_range) != 2 or config.score_range[0] >= config.score_range[1]:
        wrong.append(f"algorithm.score_range: {config.score_range} is not [lowest, highest]")
    if config.base <= 1:
        wrong.append(f"algorithm.base: {config.base} is not above 1")
    return wrong


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return not config.renew_reference


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    watch_held_out(run, run.given.chosen("held_out", chosen), partial(watch, run))
    given = run.given.chosen("preferences", chosen)
    weigh = partial(weight, run.recipe.algorithm)
    updates = given_examples(run, given) if given else partial(sampled_examples, run, weigh)
    for _ in run.iterations():
        tally = Tally()
        for examples in updates():
            update(run, examples, partial(losses, run, tally), tally)
        close_iteration(run, tally)


def chosen(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[Compared]:
    """The decided pairs, each with its weight.

    Raises: UserError, see `pairs`; and where no pair has a weight.
    """
    config: Config = recipe.algorithm
    pairs = decided_pairs(recipe, records, place)
    check_scores(pairs, config.dimension, place)
    found = [Compared(pair, weight(config, *score_of(pair, config.dimension))) for pair in pairs]
    if not any(item.weight for item in found):
        raise UserError(
            f"{place}: no pair has a gap within algorithm.score_range {config.score_range}; set it to the range of the "
            "scores"
        )
    return found


def weight(config: Config, better: float, worse: float) -> float:
    """A pair's weight, from 0 to base - 1."""
    low, high = config.score_range
    scaled = ((torch.tensor([better, worse], dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return float(gap_weight(scaled[0], scaled[1], config.base))


def losses(run: Run, tally: Tally, errors: Tensor, reference: Tensor, batch: Batch) -> Tensor:
    """(P,) weighted; errors and reference (P, 2)."""
    watch(run, tally, errors, reference, batch)
    tally.add("weight", batch.weights)
    found = batch.weights * dpo_loss(margins(errors, reference, run.recipe.algorithm.beta))
    return found + run.recipe.algorithm.anchor * errors[:, 0]


def watch(run: Run, tally: Tally, errors: Tensor, reference: Tensor, batch: Batch) -> None:
    """Note how the policy tells these pairs apart."""
    watch_pairs(tally, margins(errors, reference, run.recipe.algorithm.beta), errors, reference, batch.levels)
