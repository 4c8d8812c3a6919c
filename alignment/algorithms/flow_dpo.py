"""Flow-DPO (VideoAlign, arXiv 2501.13918): the better of two videos becomes likelier than under the reference.

A video's likelihood is how well the velocity at a noised copy of it points from the video to the noise. Both of a pair
share level and noise; beta is the same at all levels, which the paper found better than its derivation's (1 - level)^2.

    paper, Adam 5e-6, LoRA of rank 64 and alpha 128, 64 pairs an update, one epoch     beta 500
    published ports to images, LoRA of rank 32, lr 1e-5 to 3e-4                        beta 100 to 2000

Pairs are given (data.preferences), or sampled by the policy itself every iteration (data.prompts). Other losses of the
same margin: `ipo` (arXiv 2310.12036), which has a target for the margin, and `poly` (Poly-DPO of ViPO), for noisy
labels. `noise: own` compares the members at the noises that they were generated from (PNAPO, arXiv 2605.09433), and
`gap_beta` lets the gap of their scores and the progress of the run scale beta as there. `rarity` weights pairs as
VideoDPO does (arXiv 2412.14167).

Differs from the paper: its listing sums the squared errors over a latent's elements, and with its beta of 500 that is a
margin thousands of times larger; here errors are means, as in DenseDPO's listing and in all published ports.

Logs: loss, implicit_accuracy (share of pairs that the policy tells apart better than the reference does), margin,
margin/size, margin/levels_<low>_<high>, error/winner and error/loser (over the reference's), pairs, pairs/tied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from ..config import Recipe
from ..data import Group, Pair, rarity_weights, standard_gaps
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
from ..preference_losses import SCHEDULES, beta_at, dpo_loss, gap_beta, ipo_loss, margins, poly_loss
from ..tally import Tally
from ..training import Run

LOSSES = ("dpo", "ipo", "poly")


@dataclass
class Config(PairConfig):
    loss: str = "dpo"  # dpo, ipo or poly
    poly_alpha: float = 1.0  # of poly: about 8 for noisy labels, 0 is dpo, below 0 for pairs that are too easy
    beta_schedule: str = "constant"  # over noise levels: constant, or flow for (1 - level)^2
    gap_beta: bool = False  # beta grows with the gap of the scores and falls to a half over the run
    rarity: float = 0.0  # exponent of the weight of pairs with an unusual gap; 0: all weigh the same


def check(recipe: Recipe, processes: int = 1) -> list[str]:
    """Combinations that cannot learn, one line each."""
    config: Config = recipe.algorithm
    wrong = check_pairs(recipe, processes)
    if config.loss not in LOSSES:
        wrong.append(f"algorithm.loss: {config.loss!r} is none of {', '.join(LOSSES)}")
    if config.beta_schedule not in SCHEDULES:
        wrong.append(f"algorithm.beta_schedule: {config.beta_schedule!r} is none of {', '.join(SCHEDULES)}")
    if config.loss == "ipo" and (config.gap_beta or config.beta_schedule == "flow"):
        wrong.append("algorithm.loss: ipo divides by beta, which gap_beta and beta_schedule flow let vanish; use dpo")
    if config.rarity and recipe.data.preferences is None:
        wrong.append("algorithm.rarity: needs the gaps of all pairs, so data.preferences; set it to 0")
    return wrong


def needs_reference(config: Config) -> bool:
    """Whether the weights before training have to be at hand."""
    return not config.renew_reference


def train(run: Run) -> None:
    """Train until the recipe's iterations are done."""
    watch_held_out(run, run.given.chosen("held_out", chosen), partial(watch, run))
    given = run.given.chosen("preferences", chosen)
    updates = given_examples(run, given) if given else partial(sampled_examples, run)
    for _ in run.iterations():
        tally = Tally()
        for examples in updates():
            update(run, examples, partial(losses, run, tally), tally)
        close_iteration(run, tally)


def chosen(recipe: Recipe, records: Sequence[Pair | Group], place: str) -> list[Compared]:
    """The decided pairs with their weights and the gaps of their scores. Raises: UserError, see `pairs`."""
    config: Config = recipe.algorithm
    pairs = decided_pairs(recipe, records, place)
    if config.rarity or config.gap_beta:
        check_scores(pairs, config.dimension, place)
    weights = rarity_weights(pairs, config.rarity, config.dimension) if config.rarity else [1.0] * len(pairs)
    gaps = standard_gaps(pairs, config.dimension) if config.gap_beta else [0.0] * len(pairs)
    return [Compared(*row) for row in zip(pairs, weights, gaps, strict=True)]


def losses(run: Run, tally: Tally, errors: Tensor, reference: Tensor, batch: Batch) -> Tensor:
    """(P,) by the recipe's loss; errors and reference (P, 2)."""
    config: Config = run.recipe.algorithm
    watch(run, tally, errors, reference, batch)
    beta = betas(run, batch)
    z = margins(errors, reference, beta)
    if config.loss == "ipo":
        found = ipo_loss(z, beta)
    else:
        found = poly_loss(z, config.poly_alpha) if config.loss == "poly" else dpo_loss(z)
    return batch.weights * found + config.anchor * errors[:, 0]


def watch(run: Run, tally: Tally, errors: Tensor, reference: Tensor, batch: Batch) -> None:
    """Note how the policy tells these pairs apart."""
    watch_pairs(tally, margins(errors, reference, betas(run, batch)), errors, reference, batch.levels)


def betas(run: Run, batch: Batch) -> Tensor:
    """(P,) beta of each pair, by its level and, where asked for, the gap of its scores and the progress of the run."""
    config: Config = run.recipe.algorithm
    beta = beta_at(config.beta, batch.levels, config.beta_schedule)
    return beta * gap_beta(batch.gaps, run.iteration / run.recipe.iterations) if config.gap_beta else beta
