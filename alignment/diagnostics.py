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
from .gains import Gain, Paired, compare, decompose, finite, mean, number, paired, peak, summary
from .logs import ENDS, Metrics, column, lately, phase_seconds
from .preference_checks import PAIR_CHECKS
from .settings import more_kl, setting, value_of

__all__ = ["Finding", "Gain", "Paired", "compare", "decompose", "diagnose", "paired", "summary"]

RATIO_EXACT = 1e-5  # |log ratio| of float32 rounding; above it rollout and update do not compute the same thing
RATIO_SHARE_OF_CLIP = 0.2  # a drift above this share of the clip range eats into it (clip at least 5 x the drift)
RATIO_DRIFT = 1e-3  # the same limit where no clip range is configured; 16-bit arithmetic stays below it
RATIO_BROKEN = 1e-2  # no rounding explains this: a wrong state, noise level, guidance or weight was replayed
CLIPPED_BEFORE = 0.1  # share clipped before any update that makes a warning an alarm
CLIPPED_HIGH = 0.4  # mean clip fraction: most samples no longer teach
ZERO_SPREAD = 0.3  # share of groups without a ranking over the last third: that much of the sampling is wasted
ZERO_SPREAD_ALL = 0.9  # nothing is left to learn from
LITTLE_SPREAD = 0.01  # share of variance within groups: their spread is a tenth of all, as is a reward's own noise
DEAD_SPREAD = 1e-6  # spread of a reward relative to its size below which it tells no samples apart
DEAD_ITERATIONS = 0.5  # share of iterations without spread that makes a reward dead
GRADIENT_SPIKE = 8.0  # gradient norm over the run's median
SPIKE_MIN_ITERATIONS = 5  # fewer values have no meaningful median
DOMINANT_SHARE = 0.6  # gradient share of one of three or more steps; of two steps 0.8
WEIGHTS_UNMOVED = 1e-7  # relative change of the trained weights: less is rounding
WEIGHTS_FAR = 1.0  # the weights changed by more than their own size
CLIP, RATE = ("clip", "clip_range"), ("lr", "learning_rate")  # names of settings, ours first
SLOW_PHASE = 0.5  # share of an iteration spent outside rollout and update

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
    findings += [*_length(metrics, evaluations, config), *check_gain(evaluations, config)]
    if len(evaluations) < 2:  # otherwise the same prompts before and after say it better
        findings += check_images(_image_statistics(metrics[:ENDS]), _image_statistics(metrics[-ENDS:]), config)
    return sorted(findings, key=lambda finding: LEVELS.index(finding.level))


def _image_statistics(metrics: Metrics) -> dict[str, float]:
    keys = {key for line in metrics for key in line if key.startswith("image/")}
    return {key: mean(column(metrics, key)) for key in sorted(keys)}


# --- what the iterations say -----------------------------------------------------------------------------------------


def _first_ratio(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    drift = [abs(value) for value in column(metrics, "ratio/first_deviation")]
    if not drift:
        return
    worst, clip = max(drift), value_of(config, *CLIP)
    limit = RATIO_SHARE_OF_CLIP * clip if finite(clip) else RATIO_DRIFT
    kind = "normalised log ratio" if value_of(config, "objective") == "guard" else "log ratio"
    seen = f"Before any update the {kind} of new to old policy was off by up to {number(worst)}"
    same = "Use one precision and one batch size for rollout and update"
    if worst <= min(RATIO_EXACT, limit):
        exactly = "exactly 1" if worst == 0 else f"1 within {number(worst)}"
        text = f"Before its first update the ratio of new to old policy was {exactly} in all {len(drift)} iterations."
        yield Finding("good", "On-policy check passed", text)
    elif worst > RATIO_BROKEN:
        text = (
            f"{seen}; it must be 0. The update does not see what the rollout did: check that both use the stored "
            "states and noise levels, the same guidance scale and weights, and no dropout."
        )
        yield Finding("alarm", "The first ratio is not 1", text)
    elif worst > limit:
        clip, bounds = _trust_region(config)
        text = f"{seen}. {same}, or raise {clip} to at least {1 / RATIO_SHARE_OF_CLIP:g} times the drift.{bounds}"
        yield Finding("warning", "The first ratio drifts", text)
    else:
        yield Finding("note", "The first ratio drifts a little", f"{seen}. {same} if the updates look noisy.")


def _trust_region(config: Mapping[str, Any]) -> tuple[str, str]:
    """The setting that bounds an update, and a sentence on what it bounds where that is not the plain ratio."""
    bounds = {
        "guard": " With guard it bounds the normalised ratio.",
        "dppo": " With dppo it bounds the KL, which is minus the mean of the log ratio.",
    }
    return setting(config, *CLIP, default="the clip range"), bounds.get(value_of(config, "objective"), "")


def _clipped_early(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    early = column(metrics, "clip_fraction/before_update")
    if early and max(early) > 0:
        clip, bounds = _trust_region(config)
        text = (
            f"Up to {max(early):.0%} of the terms were clipped before any update, so numerical drift decides what is "
            f"learned. Raise {clip}, or compute rollout and update with the same precision and batch size.{bounds}"
        )
        yield Finding("alarm" if max(early) > CLIPPED_BEFORE else "warning", "Clipped before any update", text)


def _clipping(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    clipped = column(metrics, "clip_fraction")
    if clipped and mean(clipped) > CLIPPED_HIGH:
        rate, (clip, bounds) = setting(config, *RATE, default="the learning rate"), _trust_region(config)
        text = f"On average {mean(clipped):.0%} of the terms were clipped. Lower {rate} or raise {clip}.{bounds}"
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
    share = lately(metrics, "groups/zero_spread")
    if share > ZERO_SPREAD:
        size = setting(config, "group_size", "samples_per_prompt", default="the number of samples a prompt")
        text = (
            f"In the last third of the iterations {share:.0%} of the groups gave every sample the same reward and "
            f"taught nothing. Use harder prompts; {'; '.join(_more_exploration(config))}; or raise {size}."
        )
        yield Finding("alarm" if share > ZERO_SPREAD_ALL else "warning", "Groups without spread", text)


def _exploration(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    share = lately(metrics, "groups/spread_share")
    if share < LITTLE_SPREAD and not lately(metrics, "groups/zero_spread") > ZERO_SPREAD:
        text = (
            f"In the last third of the iterations {number(100 * share)} % of the rewards' variance lay within groups: "
            "the samples of a prompt are nearly alike to the reward, whose own noise may decide which of them wins. "
            f"One of these helps: {'; '.join(_more_exploration(config))}."
        )
        yield Finding("warning", "Little exploration", text)


def _more_exploration(config: Mapping[str, Any]) -> list[str]:
    """What makes the samples of a prompt differ more to the reward.

    Not other initial noises: the samples differ then, but not by what the steps did, and training goes astray. On the
    tiny world at noise 0.05 nine iterations gained 0.145 with one initial noise a group and lost 0.026 with several.
    """
    found = ["use a finer reward"]
    if value_of(config, "kernel") != "ode":
        found.append(f"raise {setting(config, 'noise_level', default='the noise level')}")
        window = "window.size" if value_of(config, "window.size") else "sampler.window"
        if value_of(config, window) is not None:
            found.append(f"let more steps add noise: {setting(config, window, default='')}")
    return found


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
        updated = [line for line in metrics if key == "reward/mean" or line.get("nfe/update") != 0]  # not all tied
        there = [line[key] for line in updated if key in line]
        holes = sum(not finite(value) for value in there)
        if holes > 0 and any(map(finite, there)):
            rate = setting(config, *RATE, default="the learning rate")
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


def _dominance(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    counted, dominant = 0, Counter()  # step -> iterations; where a window moves the steps change
    for line in metrics:
        shares = {k: v for k, v in line.items() if k.startswith("gradient_share/") and finite(v)}
        if len(shares) > 1:
            counted += 1
            top = max(shares, key=shares.get)
            if shares[top] > max(DOMINANT_SHARE, 1.6 / len(shares)):
                dominant[top.rsplit("_", 1)[-1]] += 1
    if dominant.total() > counted / 2:
        step, times = dominant.most_common(1)[0]
        alone = f"Step {step} alone"
        if times <= dominant.total() / 2:
            alone, times = "One of the steps trained together, not always the same,", dominant.total()
        even = "train fewer steps at a time"
        if value_of(config, "rectify") is False and value_of(config, "objective") != "guard":
            even = f"set {setting(config, 'rectify', default='')} to true, or {even}"
        text = (
            f"{alone} gave most of the gradient in {times} of {counted} iterations; the others hardly count. "
            f"{even[0].upper()}{even[1:]}."
        )
        yield Finding("warning", "One denoising step dominates", text)


def _weights(metrics: Metrics, config: Mapping[str, Any]) -> Iterator[Finding]:
    moved = column(metrics, "drift/weights")
    if not moved:
        return
    rate = setting(config, *RATE, default="the learning rate")
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
            f"quality or variety; lower {rate}, stop earlier, or {more_kl(config)}."
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


def _length(metrics: Metrics, evaluations: Evaluations, config: Mapping[str, Any]) -> Iterator[Finding]:
    planned = config.get("iterations")
    if not finite(planned) or len(metrics) >= planned:
        return
    logged, patience = f"{len(metrics)} of {planned} iterations are logged", value_of(config, "patience")
    best, evaluated = peak(evaluations), [evaluation["iteration"] for evaluation in evaluations]
    watched = f"eval/accuracy/{value_of(config, 'watch')}"
    if ranked := {line["iteration"]: line[watched] for line in metrics if finite(line.get(watched))}:
        best, evaluated = max(ranked.items(), key=lambda pair: pair[1]), list(ranked)
    if patience and best and sum(iteration > best[0] for iteration in evaluated) >= patience:
        text = f"{logged}: {patience} evaluations after iteration {best[0]} were not better (`evaluation.patience`)."
        yield Finding("note", "Stopped at the peak", text)
    elif (limit := value_of(config, "max_winner_error")) and (column(metrics, "error/winner") or [0])[-1] > limit:
        limit = setting(config, "max_winner_error", default="")
        yield Finding("note", "Stopped where better members drift away", f"{logged}: their error passed {limit}.")
    else:
        yield Finding("note", "Not finished", f"{logged}: the run was stopped, or is still going.")


AT_ONCE = (_first_ratio, _clipped_early, _missing)  # one iteration shows it
AVERAGED = (_clipping, _spread, _exploration, _gradients, _dominance, _weights, *PAIR_CHECKS)
METRIC_CHECKS = (*AT_ONCE, *AVERAGED, _time)
