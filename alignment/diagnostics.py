"""A run's logs, read the way an experienced colleague would: what is wrong, how much, and which setting to change.

`diagnose` takes the lines of metrics.jsonl and the evaluations (see gains.py for both comparisons and words) and needs
nothing else: no weights, no torch. Every check stays silent where its metrics were not logged. The thresholds here
(iterations) and in gain_checks.py (evaluations) are judgements, wide enough for a healthy run to pass them all.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .gain_checks import LEVELS, Finding, check_gain, check_images
from .gains import Gain, Paired, compare, decompose, finite, mean, number, paired, summary

__all__ = ["Finding", "Gain", "Paired", "compare", "decompose", "diagnose", "paired", "summary"]

RATIO_EXACT = 1e-5  # |log ratio| of float32 rounding; above it rollout and update do not compute the same thing
RATIO_SHARE_OF_CLIP = 0.2  # a drift above this share of the clip range eats into it (clip at least 5 x the drift)
RATIO_DRIFT = 1e-3  # the same limit where no clip range is configured; 16-bit arithmetic stays below it
RATIO_BROKEN = 1e-2  # no rounding explains this: a wrong state, noise level, guidance or weight was replayed
CLIPPED_BEFORE = 0.1  # share clipped before any update that makes a warning an alarm
CLIPPED_HIGH = 0.4  # mean clip fraction: most samples no longer teach
ZERO_SPREAD = 0.3  # share of groups without a ranking over the last third: that much of the sampling is wasted
ZERO_SPREAD_ALL = 0.9  # nothing is left to learn from
DEAD_SPREAD = 1e-6  # spread of a reward relative to its size below which it tells no samples apart
DEAD_ITERATIONS = 0.5  # share of iterations without spread that makes a reward dead
GRADIENT_SPIKE = 8.0  # gradient norm over the run's median
SPIKE_MIN_ITERATIONS = 5  # fewer values have no meaningful median
DOMINANT_SHARE = 0.6  # gradient share of one of three or more steps; of two steps 0.8
WEIGHTS_UNMOVED = 1e-7  # relative change of the trained weights: less is rounding
WEIGHTS_FAR = 1.0  # the weights changed by more than their own size
ENDS = 3  # iterations averaged at either end of the run
SLOW_PHASE = 0.5  # share of an iteration spent outside rollout and update


Metrics = Sequence[Mapping[str, Any]]
Evaluations = Sequence[Mapping[str, Any]]


def diagnose(metrics: Metrics, evaluations: Evaluations, config: Mapping[str, Any] | None = None) -> list[Finding]:
    """Read a run's logs.

    Args:
        metrics: one mapping an iteration, as in metrics.jsonl; missing keys and None are allowed.
        evaluations: the contents of samples/*/scores.json by iteration; the first and last are compared.
        config: the recipe, to name the setting to change; without it settings are described.
    Returns: findings, the most serious first.
    """
    config = config or {}
    findings = [finding for check in METRIC_CHECKS for finding in check(metrics, config)]
    findings += check_gain(evaluations)
    if len(evaluations) < 2:  # otherwise the same prompts before and after say it better
        findings += check_images(*(_image_statistics(part) for part in (metrics[:ENDS], metrics[-ENDS:])))
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _image_statistics(metrics: Metrics) -> dict[str, float]:
    keys = {key for line in metrics for key in line if key.startswith("image/")}
    return {key: mean(column(metrics, key)) for key in sorted(keys)}


def column(metrics: Metrics, key: str) -> list[float]:
    """The usable values of one metric, in order."""
    return [line[key] for line in metrics if finite(line.get(key))]


def setting(config: Mapping[str, Any], *names: str, default: str) -> str:
    """`algorithm.clip (now 0.001)` for the first of the names found anywhere in the recipe, else the default words."""
    found = {path: value for path, value in _leaves(config).items() if not path.startswith(("rewards.", "versions."))}
    for name in names:
        for path, value in found.items():
            if path.rsplit(".", 1)[-1] == name:
                return f"`{path}` (now {value})"
    return default


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in config.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return leaves


# --- what the iterations say -----------------------------------------------------------------------------------------


def _first_ratio(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    drift = [abs(value) for value in column(metrics, "ratio/first_deviation")]
    if not drift:
        return
    worst = max(drift)
    clips = [v for k, v in _leaves(config).items() if k.rsplit(".", 1)[-1] in ("clip", "clip_range") and finite(v)]
    limit = RATIO_SHARE_OF_CLIP * min(clips) if clips else RATIO_DRIFT
    if worst <= RATIO_EXACT:
        exactly = "exactly 1" if worst == 0 else f"1 within {number(worst)}"
        text = f"Before its first update the ratio of new to old policy was {exactly} in all {len(drift)} iterations."
        yield Finding("good", "On-policy check passed", text)
    elif worst > RATIO_BROKEN:
        text = (
            f"Before any update the log ratio of new to old policy was off by up to {number(worst)}; it must be 0. "
            "The update does not see what the rollout did: check that both use the stored states and noise levels, "
            "the same guidance scale and weights, and no dropout."
        )
        yield Finding("alarm", "The first ratio is not 1", text)
    else:
        text = (
            f"Before any update the log ratio of new to old policy was off by up to {number(worst)}. Use one precision "
            "and one batch size for rollout and update"
        )
        if worst > limit:
            clip = setting(config, "clip", "clip_range", default="the clip range")
            yield Finding(
                "warning", "The first ratio drifts", f"{text}, or raise {clip} to at least 5 times the drift."
            )
        else:
            yield Finding("note", "The first ratio drifts a little", f"{text} if the updates look noisy.")


def _clipping(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    clip = setting(config, "clip", "clip_range", default="the clip range")
    early = column(metrics, "clip_fraction/before_update")
    if early and max(early) > 0:
        text = (
            f"Up to {max(early):.0%} of the terms were clipped before any update, so numerical drift decides what is "
            f"learned. Raise {clip}, or compute rollout and update with the same precision and batch size."
        )
        yield Finding("alarm" if max(early) > CLIPPED_BEFORE else "warning", "Clipped before any update", text)
    clipped = column(metrics, "clip_fraction")
    if clipped and mean(clipped) > CLIPPED_HIGH:
        rate = setting(config, "lr", "learning_rate", default="the learning rate")
        text = f"On average {mean(clipped):.0%} of the terms were clipped. Lower {rate} or raise {clip}."
        yield Finding("warning", "Most updates are clipped", text)


def _spread(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    spread = [
        line["reward/std"] <= DEAD_SPREAD * max(1.0, abs(line["reward/mean"]))
        for line in metrics
        if finite(line.get("reward/std")) and finite(line.get("reward/mean"))
    ]
    if spread and mean(spread) >= DEAD_ITERATIONS:
        text = (
            f"In {sum(spread)} of {len(spread)} iterations all samples had the same reward, so there was nothing to "
            "learn from. Check the reward on a good and a bad clip, or choose one that grades more finely."
        )
        yield Finding("alarm", "The reward is dead", text)
        return
    groups = column(metrics, "groups/zero_spread")
    share = mean(groups[-max(1, len(groups) // 3) :])
    if groups and share > ZERO_SPREAD:
        size = setting(config, "group_size", "samples_per_prompt", default="the number of samples a prompt")
        text = (
            f"In the last third of the run {share:.0%} of the groups gave every sample the same reward and taught "
            f"nothing. Use harder prompts, a finer reward, more `sampler.noise_level`, or raise {size}."
        )
        yield Finding("alarm" if share > ZERO_SPREAD_ALL else "warning", "Groups without spread", text)


def _missing(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    masked = column(metrics, "reward/invalid")
    bad = sum(count > 0 for count in masked)
    if bad:
        text = (
            f"{sum(masked):g} samples in {bad} of {len(masked)} iterations had no usable reward (failed or not finite) "
            "and were left out. Check the reward's own log and the clips it failed on."
        )
        yield Finding("alarm" if bad > len(masked) / 2 else "warning", "Rewards were missing", text)
    for key in ("loss", "grad_norm", "reward/mean"):
        there = [line[key] for line in metrics if key in line]
        holes = sum(not finite(value) for value in there)
        if holes > 0 and any(map(finite, there)):
            rate = setting(config, "lr", "learning_rate", default="the learning rate")
            text = (
                f"{key} had no finite value in {holes} of {len(there)} iterations: no sample could be used, or it "
                f"overflowed. Look for masked rewards; lower {rate} or use float32."
            )
            yield Finding("alarm", f"{key} was not finite", text)


def _gradients(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    norms = [(line.get("iteration"), line["grad_norm"]) for line in metrics if finite(line.get("grad_norm"))]
    if len(norms) >= SPIKE_MIN_ITERATIONS:
        middle = statistics.median(value for _, value in norms)
        spikes = [(i, value) for i, value in norms if value > GRADIENT_SPIKE * middle > 0]
        if spikes:
            at, worst = max(spikes, key=lambda spike: spike[1])
            clip = setting(config, "max_grad_norm", "grad_clip", "clip_grad_norm", default="the gradient clip")
            text = (
                f"The gradient norm, usually {number(middle)}, was {number(worst)} at iteration {at} and more than "
                f"{GRADIENT_SPIKE:g} times the usual in {len(spikes)} of {len(norms)} iterations. Spikes come before "
                f"collapses: lower {clip}, or use more prompts an iteration."
            )
            yield Finding("warning", "Gradient spikes", text)
    dominant, counted = Counter(), 0
    for line in metrics:
        shares = {k: v for k, v in line.items() if k.startswith("gradient_share/") and finite(v)}
        if len(shares) > 1:
            counted += 1
            top = max(shares, key=shares.get)
            dominant[top] += shares[top] > max(DOMINANT_SHARE, 1.6 / len(shares))
    if counted and dominant.total() > counted / 2:
        step, times = dominant.most_common(1)[0]
        step = step.rsplit("_", 1)[-1]
        text = (
            f"Step {step} alone gave most of the gradient in {times} of {counted} iterations; the other trained steps "
            "hardly count. Weight the steps by their noise, or train fewer of them."
        )
        yield Finding("warning", "One denoising step dominates", text)


def _weights(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    moved = column(metrics, "drift/weights")
    if not moved:
        return
    rate = setting(config, "lr", "learning_rate", default="the learning rate")
    if moved[-1] <= WEIGHTS_UNMOVED:
        text = (
            f"After {len(metrics)} iterations the trained weights are where they started (relative change "
            f"{number(moved[-1])}). Check that the adapter's target names match layers, that the trained weights are "
            f"kept in float32, and {rate}."
        )
        yield Finding("alarm", "The weights did not move", text)
    elif moved[-1] > WEIGHTS_FAR:
        text = (
            f"The trained weights changed by {number(moved[-1])} times their own size. Look at the samples for lost "
            f"quality or variety; lower {rate}, stop earlier, or add a KL penalty."
        )
        yield Finding("warning", "Far from the start", text)


def _time(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    phases = phase_seconds(metrics)
    total = sum(phases.values())
    advice = {
        "decode": "Score fewer frames or decode in larger batches",
        "reward": "Score in larger batches, or serve the reward from another process or machine",
        "other": "Evaluate and save less often, and look for slow data loading",
    }
    for name, hint in advice.items():
        if total > 0 and phases.get(name, 0) / total > SLOW_PHASE:
            text = f"{phases[name] / total:.0%} of the time went to {name}, not to sampling or updates. {hint}."
            yield Finding("note", f"Slow phase: {name}", text)


def phase_seconds(metrics: Metrics) -> dict[str, float]:
    """Seconds of the whole run by phase: rollout, decode, reward, update, and other (the rest of the iterations)."""
    phases = {name: sum(column(metrics, f"time/{name}")) for name in ("rollout", "decode", "reward", "update")}
    rest = sum(column(metrics, "time/iteration")) - sum(phases.values())
    return {name: seconds for name, seconds in (phases | {"other": max(rest, 0.0)}).items() if seconds > 0}


def _length(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    planned = config.get("iterations")
    if finite(planned) and len(metrics) < planned:
        text = f"{len(metrics)} of {planned} iterations are logged: the run was stopped, or is still going."
        yield Finding("note", "Not finished", text)


METRIC_CHECKS = (_first_ratio, _clipping, _spread, _missing, _gradients, _weights, _time, _length)
