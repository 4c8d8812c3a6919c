"""Diagnostics: every finding fires on a log that was planted to show it and stays silent on a healthy one."""

import math
import random

import pytest

from alignment.diagnostics import diagnose
from alignment.settings import more_kl, setting, value_of

CONFIG = {
    "iterations": 12,
    "rewards": {"motion": {"use": "sprite", "options": {"lr": 7}}},
    "algorithm": {"name": "grpo", "clip": 1e-3, "group_size": 8},
    "optimizer": {"lr": 1e-3, "max_grad_norm": 1.0},
}
NUM = 40


def healthy_metrics() -> list[dict]:
    draw = random.Random(0)
    return [
        {
            "iteration": i,
            "reward/mean": 0.5 + 0.02 * i,
            "reward/std": 0.2,
            "reward/invalid": 0,
            "ratio/first_deviation": 0.0,
            "ratio/max_deviation": 5e-4,
            "clip_fraction": 0.1,
            "clip_fraction/before_update": 0.0,
            "kl": None,
            "loss": draw.gauss(0, 0.01),
            "grad_norm": draw.uniform(0.5, 1.5),
            "groups/zero_spread": 0.05,
            "gradient_share/step_0": 0.6,
            "gradient_share/step_1": 0.4,
            "image/brightness": 0.4,
            "drift/weights": 0.01 * i,
            "time/rollout": 2.0,
            "time/decode": 0.3,
            "time/reward": 0.2,
            "time/update": 3.0,
            "time/iteration": 5.6,
        }
        for i in range(1, 13)
    ]


def scores(iteration: int, motion: list, valid: list | None = None, **more) -> dict:
    """An evaluation that trains on motion; more: `shape=[...]` is a held-out reward, `image_motion=...` a statistic."""
    values = {"reward/mean": motion, "reward/motion": motion}
    if valid is not None:
        values["reward/motion/valid"] = valid
    held_out = []
    for name, column in more.items():
        kind, _, rest = name.partition("_")
        if kind in ("image", "dim"):
            values[f"image/{rest}" if kind == "image" else f"reward/motion/{rest}"] = column
        else:
            values[f"reward/{name}"] = column
            held_out.append(name)
    prompts = [f"prompt {i}" for i in range(len(motion))]
    return {
        "iteration": iteration,
        "prompts": prompts,
        "seeds": list(range(len(motion))),
        "values": values,
        "trained": {"motion": 1.0},
        "held_out": held_out,
        "videos": [],
    }


def noisy(mean: float, seed: int, num: int = NUM, spread: float = 0.05) -> list[float]:
    draw = random.Random(seed)
    return [mean + draw.gauss(0, spread) for _ in range(num)]


def healthy_evaluations() -> list[dict]:
    one = [1.0] * NUM
    return [
        scores(0, noisy(0.5, 1), one, shape=noisy(0.9, 2), dim_area=noisy(110, 3), image_brightness=noisy(0.4, 4)),
        scores(12, noisy(0.7, 5), one, shape=noisy(0.9, 6), dim_area=noisy(115, 7), image_brightness=noisy(0.42, 8)),
    ]


def titles(findings, *levels) -> set[str]:
    return {finding.title for finding in findings if not levels or finding.level in levels}


def level_of(findings, title: str) -> str:
    (found,) = [finding for finding in findings if finding.title == title]
    return found.level


def test_healthy_run_has_only_good_findings():
    findings = diagnose(healthy_metrics(), healthy_evaluations(), CONFIG)
    assert titles(findings) == {
        "On-policy check passed",
        "The reward rose",
        "No held-out reward fell",
        "The gain is quality",
    }
    assert {finding.level for finding in findings} == {"good"}
    assert any("exactly 1 in all 12 iterations" in finding.text for finding in findings)


def test_empty_logs_have_no_findings():
    assert diagnose([], []) == []
    assert diagnose([{"iteration": 1}], []) == []
    assert diagnose([{"iteration": 1, "reward/mean": None, "loss": math.nan}], []) == []


PLANTED = [
    ("The first ratio is not 1", "alarm", {"ratio/first_deviation": 0.2}, "0.200"),
    ("The first ratio drifts", "warning", {"ratio/first_deviation": 5e-4}, "`algorithm.clip` (now 0.001)"),
    ("The first ratio drifts a little", "note", {"ratio/first_deviation": 1e-4}, "0.0001"),
    ("Clipped before any update", "warning", {"clip_fraction/before_update": 0.05}, "5%"),
    ("Clipped before any update", "alarm", {"clip_fraction/before_update": 0.5}, "50%"),
    ("Most updates are clipped", "warning", {"clip_fraction": 0.7}, "`optimizer.lr` (now 0.001)"),
    ("The reward is dead", "alarm", {"reward/std": 0.0}, "12 of 12"),
    ("Groups without spread", "warning", {"groups/zero_spread": 0.5}, "`algorithm.group_size` (now 8)"),
    ("Groups without spread", "alarm", {"groups/zero_spread": 1.0}, "100%"),
    ("Rewards were missing", "alarm", {"reward/invalid": 2}, "24 samples in 12 of 12"),
    ("The weights did not move", "alarm", {"drift/weights": 0.0}, "target names"),
    ("Far from the start", "warning", {"drift/weights": 2.0}, "2.00 times"),
    ("Slow phase: decode", "note", {"time/decode": 20.0, "time/iteration": 25.2}, "79%"),
    ("Slow phase: reward", "note", {"time/reward": 20.0, "time/iteration": 25.3}, "another process"),
    ("Slow phase: other", "note", {"time/iteration": 50.0}, "89%"),
    (
        "One denoising step dominates",
        "warning",
        {"gradient_share/step_0": 0.95, "gradient_share/step_1": 0.05},
        "Step 0",
    ),
]


@pytest.mark.parametrize(("title", "level", "values", "words"), PLANTED, ids=lambda value: str(value)[:40])
def test_planted_in_every_iteration(title, level, values, words):
    metrics = [line | values for line in healthy_metrics()]
    findings = diagnose(metrics, healthy_evaluations(), CONFIG)
    assert level_of(findings, title) == level
    assert titles(findings, "alarm", "warning", "note") == {title}
    assert words in next(finding.text for finding in findings if finding.title == title)


@pytest.mark.parametrize(
    ("title", "level", "values", "words"),
    [
        ("Gradient spikes", "warning", {"grad_norm": 40.0}, "40.0 at iteration 6"),
        ("Rewards were missing", "warning", {"reward/invalid": 3}, "3 samples in 1 of 12"),
        ("loss was not finite", "alarm", {"loss": math.nan}, "1 of 12"),
        ("grad_norm was not finite", "alarm", {"grad_norm": None}, "1 of 12"),
    ],
)
def test_planted_in_one_iteration(title, level, values, words):
    metrics = healthy_metrics()
    metrics[5] |= values
    findings = diagnose(metrics, healthy_evaluations(), CONFIG)
    assert level_of(findings, title) == level
    assert titles(findings, "alarm", "warning", "note") == {title}
    assert words in next(finding.text for finding in findings if finding.title == title)


def found_by(findings, title: str) -> str:
    """The text of the one finding with this title."""
    (text,) = [finding.text for finding in findings if finding.title == title]
    return text


def with_settings(**algorithm) -> dict:
    return CONFIG | {"algorithm": CONFIG["algorithm"] | algorithm}


@pytest.mark.parametrize(
    ("objective", "clip", "drift", "title", "level"),
    [
        ("clip", 1e-5, 9e-6, "The first ratio drifts", "warning"),  # rounding, but most of the range
        ("clip", 1e-5, 1.5e-6, "On-policy check passed", "good"),
        ("guard", 4e-6, 3e-6, "The first ratio drifts", "warning"),
        ("guard", 4e-6, 7e-7, "On-policy check passed", "good"),
        ("dppo", 1e-5, 1e-4, "The first ratio drifts", "warning"),
    ],
)
def test_drift_is_compared_with_what_bounds_the_update(objective, clip, drift, title, level):
    metrics = [line | {"ratio/first_deviation": drift} for line in healthy_metrics()]
    findings = diagnose(metrics, healthy_evaluations(), with_settings(objective=objective, clip=clip))
    assert level_of(findings, title) == level
    text = found_by(findings, title)
    if level == "warning":
        assert f"raise `algorithm.clip` (now {clip}) to at least 5 times the drift." in text
        assert ("normalised log ratio" in text) == ("bounds the normalised ratio" in text) == (objective == "guard")
        assert ("bounds the KL" in text) == (objective == "dppo")


SAMPLER = {"kernel": "dance", "noise_level": 0.3, "window": None, "shared_noise": True}
NOISE = "raise `sampler.noise_level` (now 0.3)"


@pytest.mark.parametrize(
    ("sampler", "algorithm", "advice"),
    [
        ({}, {}, [NOISE]),
        ({"window": [0, 8]}, {}, [NOISE, "let more steps add noise: `sampler.window` (now [0, 8])"]),
        ({}, {"window": {"size": 2}}, [NOISE, "let more steps add noise: `algorithm.window.size` (now 2)"]),
        ({"kernel": "ode", "shared_noise": False}, {}, []),
    ],
)
def test_little_exploration(sampler, algorithm, advice):
    """1 % of the variance within groups over the last third; more noise in the steps, or in more of them, helps."""
    config = with_settings(**algorithm) | {"sampler": SAMPLER | sampler}
    metrics = [line | {"groups/spread_share": 0.3} for line in healthy_metrics()]
    metrics[-5:-4] = [metrics[-5] | {"groups/spread_share": 0.0}]
    assert titles(diagnose(metrics, healthy_evaluations(), config), "alarm", "warning", "note") == set()
    for line in metrics[-4:]:
        line["groups/spread_share"] = 0.004
    text = found_by(diagnose(metrics, healthy_evaluations(), config), "Little exploration")
    assert text.startswith("In the last third of the iterations 0.400 % of the rewards' variance")
    given = text.partition("One of these helps: ")[2].rstrip(".").split("; ")
    assert len(given) == len(advice) + 1
    assert all(part in whole for part, whole in zip(advice, given[1:], strict=True))
    for line in metrics:  # a constant group is told of in one finding
        line["groups/zero_spread"] = 1.0
    found = titles(diagnose(metrics, healthy_evaluations(), config), "alarm", "warning", "note")
    assert found == {"Groups without spread"}


def moving(shares: list[float], iterations: int = 12, every: int = 1) -> list[dict]:
    """Windows that move by a step every so many iterations, with these shares in them."""
    metrics = healthy_metrics()[:iterations]
    for i, line in enumerate(metrics):
        del line["gradient_share/step_0"], line["gradient_share/step_1"]
        line |= {f"gradient_share/step_{i // every + place}": share for place, share in enumerate(shares)}
    return metrics


def test_moving_windows():
    """The last step of every window outweighs the others: no step does so by itself, and a balance is none's fault."""
    title = "One denoising step dominates"
    config = with_settings(rectify=False)
    text = found_by(diagnose(moving([0.05, 0.05, 0.1, 0.8]), [], config), title)
    assert text.startswith("One of the steps trained together, not always the same, gave most of the gradient in 12 of")
    assert text.endswith("Set `algorithm.rectify` (now False) to true, or train fewer steps at a time.")
    text = found_by(diagnose(moving([0.05, 0.05, 0.1, 0.8], every=12), [], config), title)
    assert text.startswith("Step 3 alone gave most of the gradient in 12 of 12 iterations")
    for even in (moving([0.2, 0.25, 0.25, 0.3]), moving([0.3, 0.7]), moving([1.0])):
        assert title not in titles(diagnose(even, [], config))
    for balanced in ({"rectify": True}, {"rectify": False, "objective": "guard"}):
        text = found_by(diagnose(moving([0.1, 0.1, 0.8]), [], with_settings(**balanced)), title)
        assert text.endswith("hardly count. Train fewer steps at a time.")


def test_names_of_settings():
    """The place and the present value, not of rewards or versions; ends of paths tell namesakes apart."""
    config = {"rewards": {"lr": 1}, "versions": {"lr": 2}, "optimizer": {"lr": 3}, "window": {"size": None, "end": {}}}
    assert setting(config, "lr", default="") == "`optimizer.lr` (now 3)"
    assert setting(config, "rate", "lr", default="") == "`optimizer.lr` (now 3)"
    assert setting(config, "r", default="the rate") == "the rate"
    assert setting(config, "window.size", default="") == "`window.size` (now None)"
    assert value_of(config, "optimizer.lr") == 3
    assert value_of(config, "size", "lr") is value_of(config, "nothing") is None
    assert more_kl(config) == "add a KL penalty"
    assert more_kl({"algorithm": {"beta": 1.0, "kl": 0.0}}) == "raise `algorithm.kl` (now 0.0)"
    assert more_kl({"algorithm": {"beta": 500.0}, "optimizer": {"betas": 1}}) == "raise `algorithm.beta` (now 500.0)"


def test_sliding_windows_dominate_no_step():
    """One trained step an iteration has all of the gradient, rightly."""
    metrics = healthy_metrics()
    for i, line in enumerate(metrics):
        del line["gradient_share/step_1"]
        line["gradient_share/step_0"] = None
        line[f"gradient_share/step_{i}"] = 1.0
    assert "One denoising step dominates" not in titles(diagnose(metrics, healthy_evaluations(), CONFIG))


def test_stopped_run_is_named():
    findings = diagnose(healthy_metrics()[:7], healthy_evaluations(), CONFIG)
    assert level_of(findings, "Not finished") == "note"


def test_settings_are_described_without_a_recipe():
    findings = diagnose([line | {"clip_fraction": 0.9} for line in healthy_metrics()], [])
    assert any("the learning rate" in finding.text for finding in findings)


def planted_evaluations(after: dict, before: dict | None = None) -> list[dict]:
    pair = healthy_evaluations()
    for evaluation, values in zip(pair, (before or {}, after), strict=True):
        evaluation["values"] |= values
    return pair


def both(values: list) -> dict:
    return {"reward/mean": values, "reward/motion": values}


HALF = [1.0, 0.0] * (NUM // 2)
EVALUATED = [
    ("Reward hacking", "alarm", {"reward/shape": noisy(0.7, 9)}, {}),
    ("No significant gain", "warning", both(noisy(0.5, 10)), {}),
    ("The reward fell", "alarm", both(noisy(0.3, 10)), {}),
    ("The pictures changed", "warning", {"image/brightness": noisy(0.6, 10)}, {}),
    ("The area changed", "warning", {"reward/motion/area": noisy(150, 10)}, {}),
    ("A reward is saturated", "note", both([1.0] * NUM), {}),
    ("A reward was saturated from the start", "warning", both([1.0] * NUM), both([1.0] * (NUM - 1) + [0.0])),
    ("A reward is dead", "alarm", both([0.5] * NUM), both([0.5] * NUM)),
]


@pytest.mark.parametrize(("title", "level", "after", "before"), EVALUATED, ids=[row[0] for row in EVALUATED])
def test_planted_in_the_evaluations(title, level, after, before):
    findings = diagnose(healthy_metrics(), planted_evaluations(after, before), CONFIG)
    assert level_of(findings, title) == level
    assert titles(findings, "alarm", "warning", "note") - {"No significant gain"} <= {title}


def test_falling_validity_and_falling_watch():
    lost = [v * r for v, r in zip(HALF, noisy(0.5, 10), strict=True)]
    after = both(lost) | {"reward/motion/valid": HALF, "reward/shape": noisy(0.7, 9)}
    findings = diagnose(healthy_metrics(), planted_evaluations(after), CONFIG)
    assert titles(findings, "alarm") == {"The reward fell"}
    assert titles(findings, "warning") == {"Fewer valid clips", "A held-out reward fell"}


def test_gain_of_validity_only():
    weak = both([v * r for v, r in zip(HALF, noisy(0.7, 10), strict=True)]) | {"reward/motion/valid": HALF}
    findings = diagnose(healthy_metrics(), planted_evaluations({}, weak), CONFIG)
    assert titles(findings, "warning") == {"The gain is mostly validity"}
    assert "50% to 100%" in next(f.text for f in findings if f.title == "The gain is mostly validity")
    assert "The gain is quality" not in titles(findings)


def test_gain_that_valid_clips_do_not_show():
    """Invalid clips score 0.1 before, so nothing splits; the valid ones gain nothing."""
    base = noisy(0.7, 5)
    weak = [r if v else 0.1 for v, r in zip(HALF, base, strict=True)]
    findings = diagnose([], planted_evaluations({}, both(weak) | {"reward/motion/valid": HALF}), CONFIG)
    assert "No gain on valid clips" in titles(findings, "warning")


def test_peak_is_found_between_first_and_last():
    first, last = healthy_evaluations()
    middle = scores(6, noisy(0.9, 11), [1.0] * NUM, shape=noisy(0.9, 12))
    findings = diagnose(healthy_metrics(), [first, middle, last], CONFIG)
    assert titles(findings, "warning") == {"Past the peak"}
    text = found_by(findings, "Past the peak")
    assert text.startswith("Since iteration 6 the trained reward changed by -0.2")
    assert "`evaluation.patience`" in text
    impatient = CONFIG | {"evaluation": {"patience": 0}}
    assert "Set `evaluation.patience` (now 0)" in found_by(
        diagnose([], [first, middle, last], impatient), "Past the peak"
    )


def test_with_patience_the_peak_is_kept():
    first, last = healthy_evaluations()
    middle = scores(6, noisy(0.9, 11), [1.0] * NUM, shape=noisy(0.9, 12))
    config = CONFIG | {"evaluation": {"patience": 1}}
    findings = diagnose(healthy_metrics(), [first, middle, last], config)
    assert titles(findings, "alarm", "warning") == set()
    assert found_by(findings, "The weights of the peak are kept").startswith("Of 3 evaluations that of iteration 6 was")
    assert "those of the peak" in found_by(findings, "Past the peak")
    stopped = diagnose(healthy_metrics()[:10], [first, middle, last], config)
    assert "10 of 12 iterations are logged: 1 evaluations after iteration 6" in found_by(stopped, "Stopped at the peak")
    assert "Not finished" in titles(diagnose(healthy_metrics()[:10], [first, middle], config))
    first["values"]["reward/shape"], middle["values"]["reward/shape"] = noisy(0.5, 2), noisy(1.2, 12)
    watch = diagnose(healthy_metrics(), [first, middle, last], config)
    assert level_of(watch, "Past the peak of shape") == "warning"  # the weights were not chosen for this


def test_other_prompts_are_not_compared():
    first, last = healthy_evaluations()
    last["seeds"] = last["seeds"][::-1]
    findings = diagnose(healthy_metrics(), [first, last], CONFIG)
    assert titles(findings, "alarm", "warning", "note") == {"Evaluations cannot be compared"}


def test_excess_of_a_size_is_no_size():
    grown = {"reward/motion/area_excess": [0.2] * NUM}
    small = {"reward/motion/area_excess": [0.1] * NUM}
    assert not titles(diagnose([], planted_evaluations(grown, small)), "warning")


def test_missing_watch_is_noted():
    pair = healthy_evaluations()
    for evaluation in pair:
        evaluation["held_out"] = []
    assert titles(diagnose(healthy_metrics(), pair, CONFIG), "note") == {"No watch on reward hacking"}


def test_pictures_are_watched_without_evaluations():
    metrics = healthy_metrics()
    for line in metrics[8:]:
        line["image/brightness"] = 0.7
    findings = diagnose(metrics, [], CONFIG)
    assert titles(findings, "warning") == {"The pictures changed"}
    assert "brightness 0.400 to 0.700" in findings[0].text


def test_worst_comes_first():
    metrics = [line | {"clip_fraction": 0.9, "drift/weights": 0.0} for line in healthy_metrics()]
    levels = [finding.level for finding in diagnose(metrics, healthy_evaluations(), CONFIG)]
    assert levels == sorted(levels, key=("alarm", "warning", "note", "good").index)
    assert levels[0] == "alarm"
