"""What the iterations of a preference run warn of: displacement, margins of the wrong size, memorised pairs, ties.

The metrics are those of preference.py: a pair's margin is z = -(beta / 2) (Delta of the better - Delta of the worse),
Delta the policy's error less the reference's. The thresholds are judgements: z of 0.1 to 1 and an accuracy of 0.6 to
0.8 after some hundred updates are healthy, and z of 20 to 80 was reported just before a collapse.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any

from .gain_checks import Finding
from .gains import finite, number, percent
from .logs import ENDS, Metrics, column, lately
from .settings import given_labels, setting, value_of

DISPLACED = 1.02  # error of the better members over the reference's
CHANCE = 0.55  # of pairs told apart, a coin has half; below this they are not told apart
MEMORISED = 0.9  # of the training pairs told apart
TINY_MARGIN = 0.1  # size of the margin that changes samples too little to see
RUNAWAY_MARGIN = 5.0  # size of the margin at which a pair teaches no more: its weight in the gradient is 1 / (1 + e^5)
ODD_BATCHES = 1  # iterations above that which may be chance
MOVED = 0.02  # relative change of the errors
UPDATES = 100  # after which pairs should be told apart, and until which margins should not run away
FEW_UPDATES = 20  # after fewer, even a run that is over says nothing about its pairs
TIES = 0.5  # share of groups without a pair
ALL_TIES = 0.9  # nothing is left to learn from
ONE_RANGE = 0.8  # share of one range of noise levels in the sum of their margins
RANGES = 3  # with fewer there is nothing to compare
FEW_CARRY = 0.1  # effective share of the samples

Config = Mapping[str, Any]
LATE = "In the last third of the iterations"


def _told_apart(metrics: Metrics, config: Config) -> Iterator[Finding]:
    updates = max(_updates(metrics, config), default=0)
    over = len(metrics) >= (value_of(config, "iterations") or math.inf)
    if updates < (FEW_UPDATES if over else UPDATES):
        return
    accuracy, size = lately(metrics, "implicit_accuracy"), lately(metrics, "margin/size")
    renewed = value_of(config, "renew_reference") or column(metrics, "reference/age")  # margins start again at 0
    seen = f"{LATE} {percent(accuracy)} of the training pairs were told apart (half is chance)"
    if accuracy >= CHANCE and (renewed or size >= TINY_MARGIN):
        yield _held_out(metrics, config, accuracy, seen)
    elif not renewed and size < TINY_MARGIN:
        text = (
            f"{seen}, and the margin's size was {number(size)}; {TINY_MARGIN:g} to 1 is usual after a hundred updates, "
            f"and this run made {updates}. {_more_margin(metrics, config)}."
        )
        yield Finding("warning", "Little was learned", text)
    elif not renewed:
        text = (
            f"{seen}, though the margin's size was {number(size)}: the policy moves, but not the way the labels point. "
            f"They may contradict each other (look at some pairs, leave out near ties with "
            f"{setting(config, 'tie_eps', default='a threshold')}), or updates undo each other (lower {_rate(config)})."
        )
        yield Finding("warning", "Pairs are not told apart", text)


def _held_out(metrics: Metrics, config: Config, accuracy: float, seen: str) -> Finding:
    """What pairs that were not trained on say of training pairs that are told apart."""
    found = column(metrics, "eval/pairs/implicit_accuracy")
    words = f"{seen}, with a margin of {number(lately(metrics, 'margin'))}"
    fewer = setting(config, "iterations", default="iterations")
    if found and found[-1] >= CHANCE:
        return Finding("good", "Pairs are told apart", f"{words}, and {percent(found[-1])} of the held-out ones.")
    if found and accuracy > MEMORISED:
        text = (
            f"{seen}, but {percent(found[-1])} of the held-out ones: the policy has learned these pairs by heart. Show "
            f"it each pair once, as published runs do: fewer {fewer}, or more pairs."
        )
        return Finding("warning", "Pairs were memorised", text)
    if found:
        text = f"{words}, but {percent(found[-1])} of the held-out ones. Train on more, and more varied, pairs."
        return Finding("note", "Held-out pairs are not told apart", text)
    if accuracy > MEMORISED and given_labels(config) and not column(metrics, "reference/age"):  # whose rivals are new
        text = f"{words}. Whether by heart, pairs would tell that are not trained on: name some in `data.held_out`."
        return Finding("note", "No watch on memorising", text)
    return Finding("good", "Pairs are told apart", f"{words}.")


def _more_margin(metrics: Metrics, config: Config) -> str:
    """What makes margins larger: beta alone where the errors moved all the same."""
    moved = max(abs(lately(metrics, f"error/{member}") - 1) for member in ("winner", "loser"))
    if moved > MOVED:
        return f"The errors moved by {percent(moved)} all the same, which beta should hold: raise {_beta(config)}"
    return f"Train longer, or raise {_rate(config)}"


def _displacement(metrics: Metrics, config: Config) -> Iterator[Finding]:
    winner, loser = lately(metrics, "error/winner"), lately(metrics, "error/loser")
    if not winner > DISPLACED or len(column(metrics, "error/winner")) < 3 * ENDS:
        return
    margin = lately(metrics, "margin")
    errors = f"{LATE} the better members' error was {_times(winner)} the reference's, the worse ones' {_times(loser)}"
    if loser > 1 and margin > 0:
        ways = [f"raise {_beta(config)}"]
        ways += [f"raise {found}" for found in [setting(config, "anchor", default="")] if found]
        ways += [f"let {found} end the run" for found in [setting(config, "max_winner_error", default="")] if found]
        text = (
            f"{errors}, while the margin grew from 0 to {number(margin)}: pairs are told apart by fitting both members "
            "worse (likelihood displacement). If quality fell, too, "
            f"{', '.join([f'lower {_rate(config)}', *ways[:-1]])}, or {ways[-1]}."
        )
        yield Finding("warning", "Likelihood displacement", text)
    else:
        text = f"{errors}: the policy unlearns the videos that it should prefer. Lower {_rate(config)}."
        yield Finding("warning", "Better members are fitted worse", text)


def _runaway(metrics: Metrics, config: Config) -> Iterator[Finding]:
    early = [
        (line.get("iteration"), size)
        for line, updates in zip(metrics, _updates(metrics, config), strict=True)
        if updates <= UPDATES and finite(size := line.get("margin/size")) and size > RUNAWAY_MARGIN
    ]
    if len(early) > ODD_BATCHES:
        at, worst = max(early, key=lambda row: row[1])
        text = (
            f"Within the first {UPDATES} updates the margin's size passed {RUNAWAY_MARGIN:g} in {len(early)} "
            f"iterations and was {number(worst)} at iteration {at}; such runs tend to collapse. First lower "
            f"{_rate(config)}, then change {_beta(config)}."
        )
        yield Finding("warning", "Margins run away", text)


def _ties(metrics: Metrics, config: Config) -> Iterator[Finding]:
    # Where all rewards of an iteration are equal, the reward is dead, which is said elsewhere.
    tied = lately([line for line in metrics if line.get("reward/std") != 0], "pairs/tied")
    if tied > TIES:
        ways = f"use a finer reward or harder prompts, raise {setting(config, 'group_size', default='the group size')}"
        if value_of(config, "tie_eps"):
            ways += f", or lower {setting(config, 'tie_eps', default='')}"
        text = (
            f"{LATE} {percent(tied)} of the groups had no better and worse sample, so no pair. The reward is too "
            f"coarse, or the samples of a prompt are too alike: {ways}."
        )
        yield Finding("alarm" if tied > ALL_TIES else "warning", "Many ties", text)


def _levels(metrics: Metrics, config: Config) -> Iterator[Finding]:
    keys = sorted({key for line in metrics for key in line if key.startswith("margin/levels_")})
    margins = {key: max(lately(metrics, key), 0.0) for key in keys if column(metrics, key)}
    total = sum(margins.values())
    if len(margins) >= RANGES and lately(metrics, "margin/size") >= TINY_MARGIN:
        top = max(margins, key=margins.get)
        if margins[top] > ONE_RANGE * total:
            law = setting(config, "level_law", default="the law of the noise levels")
            low, high = top.removeprefix("margin/levels_").split("_")
            text = (
                f"{LATE} the margin was {number(margins[top])} at noise levels {low} to {high} and "
                f"{number(total - margins[top])} in the other ranges together. High levels decide on layout and "
                f"motion, low ones on detail: if the labels are about something else, see {law}."
            )
            yield Finding("note", "Margins come from one range of noise levels", text)


def _always_clipped(metrics: Metrics, config: Config) -> Iterator[Finding]:
    norms, limit = column(metrics, "grad_norm"), value_of(config, "max_grad_norm")
    if column(metrics, "implicit_accuracy") and norms and limit and min(norms) > limit:
        text = (
            f"The gradient's norm was {number(min(norms))} to {number(max(norms))}, always above "
            f"{setting(config, 'max_grad_norm', default='')}. With pairs that is usual: near the reference gradients "
            "are beta / 4 times those of flow matching, and the optimiser divides by their size. The learning rate "
            "alone sets how far a step goes."
        )
        yield Finding("note", "Every gradient is clipped", text)


def _effective(metrics: Metrics, config: Config) -> Iterator[Finding]:
    share = lately(metrics, "weight/effective")
    if share < FEW_CARRY:
        text = (
            f"{LATE} the weights of the samples were worth {percent(share)} of them with equal weights. Raise "
            f"{setting(config, 'temperature', default='the temperature')}, or lower "
            f"{setting(config, 'max_weight', default='the largest weight')}."
        )
        yield Finding("warning", "Few samples carry everything", text)


def _updates(metrics: Metrics, config: Config) -> list[int]:
    """Updates on pairs since the warm-up, by the end of each iteration; sampled pairs have several an iteration."""
    warmup, several = value_of(config, "warmup") or 0, value_of(config, "updates_per_rollout") or 1
    made = [finite(line.get("implicit_accuracy")) and line.get("iteration", 0) > warmup for line in metrics]
    # Only sampled pairs are counted in the metrics: some groups may be without.
    return list(accumulate(m * (several if "pairs" in line else 1) for m, line in zip(made, metrics, strict=True)))


def _rate(config: Config) -> str:
    return setting(config, "lr", default="the learning rate")


def _beta(config: Config) -> str:
    return setting(config, "beta", default="beta")


def _times(ratio: float) -> str:
    return f"{ratio:.3f} times"


PAIR_CHECKS = (_told_apart, _displacement, _runaway, _ties, _levels, _always_clipped, _effective)
