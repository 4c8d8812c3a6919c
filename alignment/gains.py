"""What a run gained, and what the gain is made of.

Two evaluations of a run use the same prompts and seeds, so every difference here is taken prompt by prompt: the spread
between prompts, which is large, drops out. An evaluation is the content of `samples/<iteration>/scores.json`: `values`
maps `reward/mean`, `reward/<name>`, `reward/<name>/<dim>` and `image/<statistic>` to one number (or None) a prompt.

A reward that presupposes something of the clip (a sprite that can be seen, a face, a finished video) says so in a
dimension called `valid`. Then a better mean may only say that more clips are valid, and `decompose` tells how much.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

SIGNIFICANT_Z = 2.0  # a change of fewer standard errors is not called a change
ROUNDING = 1e-6  # a smaller change, relative to the values, is float32 arithmetic, however regular it is
RESAMPLES = 2000  # of the prompts, for an interval
INSIDE = 5  # dimensions of a reward that the summary names
ZERO_REWARD = 1e-9  # an invalid clip whose reward is below this scores 0, and the split of a gain is exact


class Paired(NamedTuple):
    """A mean before and after, over the prompts that have both. nan where there is nothing to compute from."""

    before: float
    after: float
    change: float
    stderr: float  # of the change, over prompts
    z: float  # change / stderr; 0 where the change is rounding
    num: int  # pairs without a missing value
    low: float  # 95 % interval of the change, see `interval`
    high: float


class Gain(NamedTuple):
    """The change of one reward, split by validity. Given valid: over the valid clips only."""

    total: Paired
    validity: Paired  # share of valid clips
    given_valid_before: float
    given_valid_after: float
    from_validity: float | None  # the two parts add up to total.change exactly; None where invalid clips do not score 0
    from_quality: float | None
    both_valid: Paired  # the reward on the prompts whose clip is valid before and after
    area_ratio: float | None  # mean `area` after / before on those prompts, where the reward reports an area


def finite(value: Any) -> bool:
    """Whether a logged value is a usable number: not None, not nan, not infinite, not a word."""
    return isinstance(value, int | float) and math.isfinite(value)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean, nan of nothing."""
    return math.fsum(values) / len(values) if values else math.nan


def paired(before: Sequence[float | None], after: Sequence[float | None]) -> Paired:
    """Mean difference of paired values with its standard error; pairs with a missing value are ignored.

    Args:
        before, after: (N,) one value a prompt, in the same order; None or nan where it is missing.
    Raises: ValueError if the lengths differ.
    """
    if len(before) != len(after):
        raise ValueError(f"paired values need equal lengths, got {len(before)} and {len(after)}")
    pairs = [(b, a) for b, a in zip(before, after, strict=True) if finite(b) and finite(a)]
    changes = [a - b for b, a in pairs]
    num, change = len(changes), mean(changes)
    stderr = math.nan
    if num > 1:
        stderr = math.sqrt(math.fsum((c - change) ** 2 for c in changes) / (num - 1) / num)
    old, new = mean([b for b, _ in pairs]), mean([a for _, a in pairs])
    z = change / stderr if stderr else math.copysign(math.inf, change)
    if abs(change) <= ROUNDING * max(abs(old), abs(new)):
        z = 0.0
    return Paired(old, new, change, stderr, z, num, *interval(changes))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean: percentiles of the means of resamples, the same in every call.

    It supposes nothing about how the values are spread, but calls for more than a few: of n normal values it is too
    narrow by sqrt(1 - 1 / n). nan of fewer than two.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13.
    """
    if len(values) < 2:
        return math.nan, math.nan
    means = resamples(len(values)) @ np.asarray(values, dtype=float) / len(values)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


@functools.lru_cache(maxsize=4)
def resamples(num: int) -> np.ndarray:
    """(RESAMPLES, num) how often each of num values is in a resample."""
    return np.random.default_rng(0).multinomial(num, [1 / num] * num, RESAMPLES).astype(float)


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Paired]:
    """Every value that two evaluations share, compared prompt by prompt.

    Raises: ValueError if the prompts or seeds differ, since then nothing is paired.
    """
    if first_and_last([before, after]) is None:
        raise ValueError("the evaluations are of different prompts or seeds and cannot be compared")
    old, new = before["values"], after["values"]
    return {key: paired(old[key], new[key]) for key in new if key in old and len(old[key]) == len(new[key])}


def first_and_last(evaluations: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """The two evaluations that state a gain, or None if there are fewer or they are of different prompts or seeds."""
    if len(evaluations) < 2:
        return None
    before, after = evaluations[0], evaluations[-1]
    same = all(before.get(key) == after.get(key) for key in ("prompts", "seeds"))
    return (before, after) if same else None


def decompose(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> Gain | None:
    """Split the gain of reward `name` into more valid clips and better valid clips.

    With P the share of valid clips and E the mean reward given valid, a reward that is 0 on invalid clips has the mean
    P E, and its change is dP mean(E) + mean(P) dE, exactly. Where one evaluation has no valid clip, its E is taken from
    the other: all of the change is then validity.

    Returns: None if the reward has no dimension `valid` or no prompt has all the values.
    """
    key = f"reward/{name}"
    columns = [e["values"].get(k) for e in (before, after) for k in (key, f"{key}/valid")]
    if any(column is None for column in columns):
        return None
    rows = [row for row in zip(*columns, strict=True) if all(map(finite, row))]
    if not rows:
        return None
    old, valid_old, new, valid_new = zip(*rows, strict=True)
    total, validity = paired(old, new), paired(valid_old, valid_new)
    e_old = mean([r for r, v in zip(old, valid_old, strict=True) if v])
    e_new = mean([r for r, v in zip(new, valid_new, strict=True) if v])
    quality = presence = None
    scores = [*zip(old, valid_old, strict=True), *zip(new, valid_new, strict=True)]
    if all(abs(r) <= ZERO_REWARD for r, v in scores if not v):
        e0, e1 = (e if finite(e) else other if finite(other) else 0.0 for e, other in ((e_old, e_new), (e_new, e_old)))
        presence = validity.change * (e0 + e1) / 2
        quality = (validity.before + validity.after) / 2 * (e1 - e0)
    both = [(r0, r1) for r0, v0, r1, v1 in rows if v0 and v1]
    both_valid = paired([r0 for r0, _ in both], [r1 for _, r1 in both])
    return Gain(
        total, validity, e_old, e_new, presence, quality, both_valid, ratio_given_valid(before, after, name, "area")
    )


def ratio_given_valid(before: Mapping[str, Any], after: Mapping[str, Any], name: str, dim: str) -> float | None:
    """Mean of `reward/<name>/<dim>` after / before, over the prompts valid both times (all, if validity is unknown)."""
    columns = []
    for values in (before["values"], after["values"]):
        column = values.get(f"reward/{name}/{dim}")
        if column is None:
            return None
        valid = values.get(f"reward/{name}/valid", [1] * len(column))
        columns.append([v if ok else None for v, ok in zip(column, valid, strict=True)])
    change = paired(*columns)
    return change.after / change.before if change.num and change.before else None


def number(value: float, signed: bool = False) -> str:
    """A value for reading: two or three significant digits, `+` for gains when signed."""
    if not finite(value):
        return "n/a" if value is None or math.isnan(value) else "inf" if value > 0 else "-inf"
    size, sign = abs(value), "+" if signed and value else ""
    if size < 0.01:
        return f"{value:{sign}.2g}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:{sign},.{digits}f}"


def percent(share: float) -> str:
    """`100%`, `99.6%`: a share with one decimal unless it is whole."""
    return f"{share:.1%}".replace(".0%", "%") if finite(share) else "n/a"


def z_words(z: float) -> str:
    """A z value for reading: one decimal is all that it tells."""
    return f"{z:.1f}" if finite(z) else number(z)


def interval_words(change: Paired) -> str:
    """`95 % +0.239 to +0.301`, or nothing where there is no interval."""
    return f"95 % {number(change.low, True)} to {number(change.high, True)}" if finite(change.low) else ""


def change_words(change: Paired) -> str:
    """`+0.270 +- 0.016 (z 17.0, 95 % +0.239 to +0.301)`."""
    sure = ", ".join(filter(None, [f"z {z_words(change.z)}", interval_words(change)]))
    return f"{number(change.change, signed=True)} +- {number(change.stderr)} ({sure})"


def peak(evaluations: Sequence[Mapping[str, Any]]) -> tuple[int, float] | None:
    """Iteration and mean of the evaluation with the best watched reward, the first of equals; None without any."""
    keys = [f"reward/{e.get('watched', 'mean')}" for e in evaluations]
    columns = [[v for v in e["values"].get(key, []) if finite(v)] for e, key in zip(evaluations, keys, strict=True)]
    means = [(e["iteration"], mean(column)) for e, column in zip(evaluations, columns, strict=True)]
    return max((pair for pair in means if finite(pair[1])), key=lambda pair: pair[1], default=None)


def summary(evaluations: Sequence[Mapping[str, Any]], title: str = "trained reward") -> list[str]:
    """Sentences that say what the run gained between its first and last evaluation, and what the gain is made of.

    Args:
        title: what to call the weighted sum of the rewards.
    """
    ends = first_and_last(evaluations)
    if ends is None:
        return ["Without the same prompts evaluated before and after training, no gain can be stated."]
    before, after = ends
    changes = compare(before, after)
    trained = after.get("trained", {})
    sentences = []
    for key, words in [("reward/mean", title)] + [(f"reward/{name}", name) for name in trained if len(trained) > 1]:
        if key in changes and changes[key].num:
            sentences.append(_moved(changes[key], words, introduce=not sentences))
    for name in trained:
        gain = decompose(before, after, name)
        if gain:
            sentences += _composition(gain, name)
        sentences += _inside(changes, name)
    held_out = [(name, changes[f"reward/{name}"]) for name in after.get("held_out", []) if f"reward/{name}" in changes]
    if held_out:
        parts = [f"{name} {number(c.before)} to {number(c.after)}, {change_words(c)}" for name, c in held_out]
        sentences.append(f"Held out, never trained on: {'; '.join(parts)}.")
    return sentences


def _moved(change: Paired, title: str, introduce: bool) -> str:
    start = f"Over {change.num} evaluation prompts, same noise before and after, the {title}" if introduce else title
    verb = "went"
    if abs(change.z) >= SIGNIFICANT_Z:
        verb = "rose" if change.change > 0 else "fell"
    tail = "" if abs(change.z) >= SIGNIFICANT_Z else ", which is within the noise"
    numbers = f"{verb} from {number(change.before)} to {number(change.after)}"
    return f"{start} {numbers}: {change_words(change)}{tail}."


def _inside(changes: Mapping[str, Paired], name: str) -> list[str]:
    """What a reward measures beside its total, as far as it changed; the clearest changes first."""
    prefix = f"reward/{name}/"
    found = {key.removeprefix(prefix): c for key, c in changes.items() if key.startswith(prefix)}
    clear = [
        (dim, c) for dim, c in found.items() if dim not in ("valid", "area") and c.num and abs(c.z) >= SIGNIFICANT_Z
    ]
    if not clear:
        return []
    clear.sort(key=lambda pair: -abs(pair[1].z))
    parts = [f"{dim.replace('_', ' ')} {number(c.before)} to {number(c.after)} (z {c.z:.1f})" for dim, c in clear]
    return [f"What {name} is made of moved: {'; '.join(parts[:INSIDE])}."]


def _composition(gain: Gain, name: str) -> list[str]:
    sentences = []
    validity = gain.validity
    if validity.before == validity.after == 1:
        sentences.append(f"Every clip was valid for {name} before and after, so its whole change is quality.")
    else:
        text = f"Valid clips for {name}: {percent(validity.before)} before, {percent(validity.after)} after."
        if gain.from_validity is not None:
            text += (
                f" Of its change, {number(gain.from_validity, True)} comes from more or fewer valid clips"
                f" and {number(gain.from_quality, True)} from the quality of valid ones."
            )
        if gain.both_valid.num > 1:
            text += f" On the {gain.both_valid.num} prompts valid both times: {change_words(gain.both_valid)}."
        sentences.append(text)
    if gain.area_ratio is not None:
        sentences.append(f"The area of what {name} looks at is {number(gain.area_ratio)} times what it was.")
    return sentences
