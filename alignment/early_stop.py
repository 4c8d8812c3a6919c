"""Early stopping: a run ends once its held-out reward is past the peak, and keeps the weights of the peak.

The weights are a snapshot of the run and the evaluated rewards are in its memory, so that a resumed run knows both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from .gains import number

if TYPE_CHECKING:
    from .training import Run

BEST = "best"  # the snapshot


class Peak(NamedTuple):
    """The best evaluation so far, the first of equals."""

    iteration: int
    reward: float
    since: int  # evaluations after it


def watch(run: Run, iteration: int, reward: float) -> None:
    """Take in the watched reward's mean of an evaluation of the weights in use, and keep these if it is the best.

    An evaluation that a resumed run repeats counts once.
    """
    earlier = [pair for pair in run.memory.get("evaluated", []) if pair[0] < iteration]
    run.memory["evaluated"] = [*earlier, [iteration, reward if math.isfinite(reward) else None]]
    best = peak(run)
    if best and best.iteration == iteration:
        run.snapshot(BEST, renew=True)


def peak(run: Run) -> Peak | None:
    """None before the first evaluation with a reward."""
    evaluated = [(iteration, reward) for iteration, reward in run.memory.get("evaluated", []) if reward is not None]
    if not evaluated:
        return None
    iteration, reward = max(evaluated, key=lambda pair: pair[1])
    return Peak(iteration, reward, sum(later > iteration for later, _ in run.memory["evaluated"]))


def past_peak(run: Run) -> bool:
    """Whether as many evaluations as the recipe has patience for brought no new best."""
    patience, best = run.recipe.evaluation.patience, peak(run)
    return patience > 0 and best is not None and best.since >= patience


def best_weights(run: Run) -> dict[str, Tensor] | None:
    """Those to save; None where the recipe asks for the last ones."""
    return run.snapshots.get(BEST) if run.recipe.evaluation.patience else None


def peak_words(run: Run) -> str:
    """What to say of the peak when the run ends."""
    best = peak(run)
    why = f"no new best in {best.since} evaluations: the run ends; " if past_peak(run) else ""
    which = f"iteration {best.iteration}, of the best held-out reward: {number(best.reward)}"
    return f"{why}saved are the weights of {which}"
