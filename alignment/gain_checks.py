"""What the evaluations before and after training warn of: reward hacking, hollow gains, drifting pictures."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .gains import (
    SIGNIFICANT_Z,
    Paired,
    change_words,
    compare,
    decompose,
    finite,
    first_and_last,
    number,
    paired,
    peak,
    percent,
    ratio_given_valid,
)
from .settings import given_labels, more_kl, reward_words, setting, value_of

LEVELS = ("alarm", "warning", "note", "good")  # the order in which findings are listed

SATURATED = 0.9  # share of evaluation prompts that hold the reward's highest value
SAME_VALUE = 1e-9  # two rewards closer than this are equal
IMAGE_MOVE = 0.3  # relative change of an image statistic that a viewer notices
SIZE_MOVE = 0.25  # relative change of a size or area dimension
SIZE_WORDS = re.compile(r"(^|_)(area|size)$")  # names of such dimensions; not area_excess and the like
VALIDITY_SHARE = 0.5  # share of a gain that comes from validity alone


class Finding(NamedTuple):
    """One thing that the logs say."""

    level: str  # one of LEVELS
    title: str
    text: str  # plain sentences: what is seen, the number, which setting to change


Evaluation = Mapping[str, Any]
Config = Mapping[str, Any]


def check_gain(evaluations: Sequence[Evaluation], config: Config) -> list[Finding]:
    """Every finding about the change from the first to the last evaluation; none where there is no such pair."""
    ends = first_and_last(evaluations)
    if ends is None:
        text = "The first and last evaluation have different prompts or seeds, so the gain cannot be measured."
        return [Finding("warning", "Evaluations cannot be compared", text)] if len(evaluations) > 1 else []
    changes = compare(*ends)
    images = {key: change for key, change in changes.items() if key.startswith("image/")}
    return [
        *_significance(changes, config),
        *_hacking(ends[1], changes, config),
        *_peak(evaluations, config),
        *_validity(*ends, config),
        *_ranges(*ends),
        *_sizes(*ends),
        *check_images({k: c.before for k, c in images.items()}, {k: c.after for k, c in images.items()}, config),
    ]


def check_images(before: Mapping[str, float], after: Mapping[str, float], config: Config) -> Iterator[Finding]:
    """Statistics of the pictures that moved so far that a viewer will see it, whatever the reward says."""
    moves = [
        f"{key.removeprefix('image/').replace('_', ' ')} {number(before[key])} to {number(after[key])}"
        for key in before
        if finite(before[key])
        and finite(after.get(key))
        and abs(after[key] - before[key]) > IMAGE_MOVE * abs(before[key])
    ]
    if moves:
        text = (
            f"Changed by more than {IMAGE_MOVE:.0%}: {', '.join(moves)}. If the reward does not ask for this, a "
            f"shortcut was found: compare the videos, add a reward that notices, {more_kl(config)}, or stop earlier."
        )
        yield Finding("warning", "The pictures changed", text)


def _rate(config: Config) -> str:
    return setting(config, "optimizer.lr", default="`optimizer.lr`")


def _significance(changes: Mapping[str, Paired], config: Config) -> Iterator[Finding]:
    change = changes.get("reward/mean")
    if change is None or change.num < 2:
        return
    if change.z >= SIGNIFICANT_Z:
        yield Finding("good", "The reward rose", f"On the evaluation prompts it changed by {change_words(change)}.")
    elif change.z <= -SIGNIFICANT_Z:
        alike = "the labels agree with it" if given_labels(config) else "evaluation samples as training does"
        text = (
            f"On the evaluation prompts the {reward_words(config)} changed by {change_words(change)}. See the other "
            f"findings and the gradient norm, lower {_rate(config)}, and check that {alike}."
        )
        yield Finding("alarm", "The reward fell", text)
    else:
        more = "use more or clearer pairs" if given_labels(config) else "take more samples a prompt"
        text = (
            f"On {change.num} evaluation prompts the {reward_words(config)} changed by {change_words(change)}, within "
            f"noise. Train longer, raise {_rate(config)}, {more}, or raise "
            f"{setting(config, 'num_prompts', default='`evaluation.num_prompts`')}."
        )
        yield Finding("warning", "No significant gain", text)


def _hacking(after: Evaluation, changes: Mapping[str, Paired], config: Config) -> Iterator[Finding]:
    names = [name for name in after.get("held_out", []) if f"reward/{name}" in changes]
    if not names:
        text = "No reward is held out. Add one with `weight: 0`: it is evaluated, never trained on, and shows cheating."
        yield Finding("note", "No watch on reward hacking", text)
        return
    fallen = [name for name in names if changes[f"reward/{name}"].z <= -SIGNIFICANT_Z]
    trained = changes.get("reward/mean")
    rising = trained is not None and trained.z >= SIGNIFICANT_Z
    both = "label by both" if given_labels(config) else "train on both"
    for name in fallen:
        words = f"{name}, on which nothing was trained, changed by {change_words(changes[f'reward/{name}'])}"
        if rising:
            text = (
                f"{words}, while the {reward_words(config)} rose. The policy is likely to exploit what it learns from: "
                f"{both}, {more_kl(config)}, lower {_rate(config)}, or stop earlier."
            )
            yield Finding("alarm", "Reward hacking", text)
        else:
            yield Finding("warning", "A held-out reward fell", f"{words}. Lower {_rate(config)} or stop earlier.")
    if not fallen:
        yield Finding("good", "No held-out reward fell", f"Watched, and never trained on: {', '.join(names)}.")


def _peak(evaluations: Sequence[Evaluation], config: Config) -> Iterator[Finding]:
    last, best = evaluations[-1], peak(evaluations)
    if best and value_of(config, "patience"):
        text = f"Of {len(evaluations)} evaluations that of iteration {best[0]} was the best; its weights are saved."
        yield Finding("good", "The weights of the peak are kept", text)
    watched = last.get("watched", "mean")
    for name in dict.fromkeys(["mean", *last.get("held_out", []), watched]):
        key = f"reward/{name}"
        since = [
            (evaluation.get("iteration"), paired(evaluation["values"][key], last["values"][key]))
            for evaluation in evaluations[1:-1]  # a fall from the very first one is reported elsewhere
            if first_and_last([evaluation, last]) and key in evaluation["values"] and key in last["values"]
        ]
        if since and (worst := min(since, key=lambda row: row[1].change))[1].z <= -SIGNIFICANT_Z:
            what = f"the {reward_words(config)}" if name == "mean" else name
            text = f"Since iteration {worst[0]} {what} changed by {change_words(worst[1])}. "
            if name == watched and value_of(config, "patience"):
                yield Finding("note", "Past the peak", text + "The weights that were saved are those of the peak.")
            else:
                patience = setting(config, "patience", default="`evaluation.patience`")
                text += (
                    f"Set {patience} and `evaluation.watch={name}`, so that a run ends at the peak and keeps its "
                    "weights, or train fewer iterations."
                )
                title = "Past the peak" if name == "mean" else f"Past the peak of {name}"
                yield Finding("warning", title, text)


def _validity(before: Evaluation, after: Evaluation, config: Config) -> Iterator[Finding]:
    for name in after.get("trained", {}):
        gain = decompose(before, after, name)
        if gain is None:
            continue
        given = f"On prompts valid both times {name} changed by {change_words(gain.both_valid)}"
        if gain.validity.z <= -SIGNIFICANT_Z:
            text = (
                f"{percent(gain.validity.before)} of the clips were valid, now {percent(gain.validity.after)} are. "
                f"Lower {_rate(config)}, {more_kl(config)}, or add a reward for what is lost."
            )
            yield Finding("warning", "Fewer valid clips", text)
        if gain.total.z < SIGNIFICANT_Z or gain.total.change <= 0:
            continue
        quality = gain.both_valid.z >= SIGNIFICANT_Z
        if gain.from_validity is not None and gain.from_validity > VALIDITY_SHARE * gain.total.change:
            share = gain.from_validity / gain.total.change
            text = (
                f"{share:.0%} of the gain in {name} is that more clips are valid ({percent(gain.validity.before)} to "
                f"{percent(gain.validity.after)}). {given}. Start from a stronger base, or reward only valid clips."
            )
            yield Finding("warning", "The gain is mostly validity", text)
        elif quality:
            yield Finding("good", "The gain is quality", f"{given}.")
        else:
            yield Finding("warning", "No gain on valid clips", f"{given}. Judge the gain by the videos.")


def _ranges(before: Evaluation, after: Evaluation) -> Iterator[Finding]:
    for name in after.get("trained", {}):
        old, new = ([v for v in e["values"].get(f"reward/{name}", []) if finite(v)] for e in (before, after))
        if len(old) < 2 or len(new) < 2:
            continue
        if max(old + new) - min(old + new) <= SAME_VALUE:
            text = f"{name} is {number(old[0])} for every evaluation prompt, before and after, and teaches nothing."
            yield Finding("alarm", "A reward is dead", text)
            continue
        top = max(old + new)
        full_old, full_new = (sum(v >= top - SAME_VALUE for v in values) / len(values) for values in (old, new))
        if full_old >= SATURATED:
            text = (
                f"{full_old:.0%} of the prompts had the highest {name} before training. Use harder prompts or rewards."
            )
            yield Finding("warning", "A reward was saturated from the start", text)
        elif full_new >= SATURATED:
            text = f"{full_new:.0%} of the prompts now have the highest {name}. Longer training cannot raise it."
            yield Finding("note", "A reward is saturated", text)


def _sizes(before: Evaluation, after: Evaluation) -> Iterator[Finding]:
    moves = {}
    for key in after["values"]:
        root, name, dim = (key.split("/") + ["", ""])[:3]
        if root == "reward" and SIZE_WORDS.search(dim):
            ratio = ratio_given_valid(before, after, name, dim)
            if ratio is not None and abs(ratio - 1) > SIZE_MOVE:
                moves.setdefault(dim, ratio)
    for dim, ratio in moves.items():
        text = (
            f"{dim} is {number(ratio)} times what it was. Size is a common shortcut: compare the videos, and "
            "penalise the change in the reward if it is not wanted."
        )
        yield Finding("warning", f"The {dim} changed", text)
