"""Which curves the run report draws from metrics.jsonl and the evaluations, and how they are scaled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..gains import finite, mean, peak
from ..logs import ENDS, column
from .charts import Band, Line, Point, area_chart, line_chart

MAX_DIMENSIONS = 12  # charts of single dimensions; the table has them all
SAME_CURVE = 1e-6  # two curves closer than this are drawn once
PHASES = {"rollout": 0, "decode": 1, "reward": 2, "update": 3, "other": 5}  # of an iteration, with their colours

Metrics = Sequence[Mapping[str, Any]]
Evaluations = Sequence[Mapping[str, Any]]


def reward_curves(metrics: Metrics, evaluations: Evaluations, held_out: Sequence[str], trained: bool) -> str:
    """Charts of the weighted sum of the rewards with its spread, then of every reward, held-out ones last (HTML).

    Args:
        trained: whether the others were trained on, not only evaluated.
    """
    names = [name for name in _reward_names(metrics, evaluations) if name not in held_out]
    note = "with the spread of samples" if column(metrics, "reward/std") else ""
    main = _reward_chart(metrics, evaluations, "mean", "Trained reward" if trained else "Reward", note)
    if main and len(names) == 1 and _equal(metrics, "reward/mean", f"reward/{names[0]}"):
        names = []  # one reward of weight 1 is the mean
    charts = [main, *(_reward_chart(metrics, evaluations, name, name, "trained" if trained else "") for name in names)]
    charts += [_reward_chart(metrics, evaluations, name, name, "held out") for name in held_out]
    return _grid(charts)


def dimension_curves(metrics: Metrics, evaluations: Evaluations) -> str:
    """Charts of the rewards' single dimensions (HTML)."""
    found = [key for line in [*metrics, *(e["values"] for e in evaluations)] for key in line]
    keys = {key.removeprefix("reward/"): None for key in found if key.startswith("reward/") and key.count("/") == 2}
    return _grid(
        _reward_chart(metrics, evaluations, key, key.replace("/", ": ")) for key in list(keys)[:MAX_DIMENSIONS]
    )


def pair_curves(metrics: Metrics) -> str:
    """Charts of how pairs are told apart, which member moved, and how many there were (HTML)."""
    told = [
        Line("training pairs", series(metrics, "implicit_accuracy"), colour=0),
        Line("held-out pairs", series(metrics, "eval/pairs/implicit_accuracy"), dots=True, colour=1),
    ]
    margins = [
        Line("mean", series(metrics, "margin"), colour=0),
        Line("mean size", series(metrics, "margin/size"), colour=2),
        Line("held-out pairs", series(metrics, "eval/pairs/margin"), dots=True, colour=1),
    ]
    members = {"better member": "error/winner", "worse member": "error/loser"}
    errors = [Line(name, series(metrics, key), colour=i) for i, (name, key) in enumerate(members.items())]
    errors += [
        Line(f"{name}, held out", series(metrics, f"eval/pairs/{key}"), dots=True, colour=i + 2)
        for i, (name, key) in enumerate(members.items())
    ]
    ranges = sorted({key for line in metrics for key in line if key.startswith("margin/levels_")})
    levels = [
        Line(key.removeprefix("margin/levels_").replace("_", " to "), series(metrics, key), colour=i)
        for i, key in enumerate(ranges)
    ]
    return _grid(
        [
            line_chart("Implicit accuracy", told, note="share told apart better than by the reference", level=0.5),
            line_chart("Margin", margins, level=0.0),
            line_chart("Error", errors, note="over the reference's", level=1.0),
            line_chart("Margin by noise level", levels, level=0.0),
            line_chart("Pairs an iteration", [Line("pairs", series(metrics, "pairs"))], zero=True),
            line_chart("Ties", [Line("share", series(metrics, "pairs/tied"))], note="groups without a pair", zero=True),
        ]
    )


def accuracy_curves(metrics: Metrics) -> str:
    """Charts of how many pairs a reward in training ranks right, in all and in each dimension (HTML)."""
    keys = {key: None for line in metrics for key in line if key.startswith(("accuracy/", "eval/accuracy/"))}
    names = dict.fromkeys(key.rpartition("accuracy/")[2] for key in keys)
    charts = []
    for name in sorted(names, key=lambda name: name != "mean"):
        lines = [
            Line("training pairs", series(metrics, f"accuracy/{name}"), colour=0),
            Line("held-out pairs", series(metrics, f"eval/accuracy/{name}"), dots=True, colour=1),
        ]
        title = "All" if name == "mean" else name.replace("_", " ")
        charts.append(line_chart(title, lines, note="share ranked right", level=0.5))
    ranges = sorted({key for line in metrics for key in line if re.fullmatch(r"eval/levels_[\d._]+/mean", key)})
    levels = [
        Line(key.split("/")[1].removeprefix("levels_").replace("_", " to "), series(metrics, key), dots=True, colour=i)
        for i, key in enumerate(ranges)
    ]
    if levels:  # of a reward on noised latents
        charts.append(line_chart("By noise level", levels, note="held-out pairs ranked right", level=0.5))
    return _grid(charts)


def health_curves(metrics: Metrics) -> str:
    """Charts of what tells a sound run from a broken one: ratio, clipping, KL, gradients, pictures, time (HTML)."""
    ratio = [
        Line("first step, must be 0", series(metrics, "ratio/first_deviation"), colour=1),
        Line("all updates", series(metrics, "ratio/max_deviation"), colour=0),
    ]
    clipped = [
        Line("all updates", series(metrics, "clip_fraction"), colour=0),
        Line("before any update", series(metrics, "clip_fraction/before_update"), colour=1),
    ]
    loss = [
        Line("training", series(metrics, "loss"), colour=0),
        Line("held-out pairs", series(metrics, "eval/loss"), dots=True, colour=1),
    ]
    return _grid(
        [
            line_chart("Ratio", ratio, note="largest deviation from 1", zero=True),
            line_chart("Clip fraction", clipped, zero=True),
            line_chart("KL to the reference", [Line("kl", series(metrics, "kl"))], zero=True),
            line_chart(
                "Gradient norm", [Line("grad_norm", series(metrics, "grad_norm"))], note="before clipping", zero=True
            ),
            line_chart("Loss", loss),
            line_chart("Learning rate", [Line("lr", series(metrics, "lr"))], zero=True),
            _stack(metrics, "gradient_share/", "Gradient share", "of each trained step"),
            line_chart("Error", [Line("error", series(metrics, "error"))], note="of the velocity, unweighted"),
            line_chart(
                "Effective samples", [Line("share", series(metrics, "weight/effective"))], note="share", zero=True
            ),
            line_chart("Groups without spread", [Line("share", series(metrics, "groups/zero_spread"))], zero=True),
            line_chart("Advantage spread", [Line("std", series(metrics, "advantage/std"))], zero=True),
            line_chart(
                "Change of the weights", [Line("drift", series(metrics, "drift/weights"))], note="relative", zero=True
            ),
            _pictures(metrics),
            _stack(metrics, "time/", "Seconds an iteration", "by phase"),
        ]
    )


def series(metrics: Metrics, key: str) -> list[Point]:
    """(iteration, value) of one metric where it has a usable value."""
    return [(line["iteration"], line[key]) for line in metrics if finite(line.get(key))]


def _reward_names(metrics: Metrics, evaluations: Evaluations) -> list[str]:
    found = {key: None for line in metrics for key in line} | {key: None for e in evaluations for key in e["values"]}
    names = [key.removeprefix("reward/") for key in found if key.startswith("reward/") and key.count("/") == 1]
    return [name for name in names if name not in ("mean", "std", "invalid")]


def _reward_chart(metrics: Metrics, evaluations: Evaluations, name: str, title: str, note: str = "") -> str:
    key = f"reward/{name}"
    training = series(metrics, key)
    means = [(e["iteration"], mean([v for v in e["values"].get(key, []) if finite(v)])) for e in evaluations]
    lines = [
        Line("training samples", training, colour=0),
        Line("evaluation prompts", [point for point in means if finite(point[1])], dots=True, colour=1),
    ]
    spread = dict(series(metrics, "reward/std")) if name == "mean" else {}
    around = [(x, y, spread[x]) for x, y in training if x in spread]
    band = Band([(x, y - s) for x, y, s in around], [(x, y + s) for x, y, s in around]) if around else None
    watched = len(evaluations) > 2 and name == evaluations[-1].get("watched", "mean")
    best = peak(evaluations) if watched else None
    return line_chart(title, lines, band=band, note=note, peak=best)


def _stack(metrics: Metrics, prefix: str, title: str, note: str) -> str:
    names = {key: None for line in metrics for key in line if key.startswith(prefix) and any(column([line], key))}
    names.pop("time/iteration", None)
    rows = [line for line in metrics if any(finite(line.get(key)) for key in names)]
    lines = [
        Line(
            key.removeprefix(prefix).replace("_", " "),
            [(line["iteration"], max(line[key], 0.0) if finite(line.get(key)) else 0.0) for line in rows],
        )
        for key in sorted(names, key=_by_step)
    ]
    if prefix == "time/" and column(metrics, "time/iteration"):
        rest = [
            (line["iteration"], max(line["time/iteration"] - sum(line[k] for k in names if finite(line.get(k))), 0.0))
            if finite(line.get("time/iteration"))
            else (line["iteration"], 0.0)
            for line in rows
        ]
        lines.append(Line("other", rest, colour=PHASES["other"]))
    return area_chart(title, lines, note, ramp=prefix != "time/")


def _by_step(key: str) -> tuple[int, str]:
    phase, step = key.removeprefix("time/"), key.rsplit("_", 1)[-1]
    return (PHASES[phase] if phase in PHASES else int(step) if step.isdigit() else len(PHASES), key)


def _pictures(metrics: Metrics) -> str:
    lines = []
    for key in {key: None for line in metrics for key in line if key.startswith("image/")}:
        start = mean(column(metrics, key)[:ENDS])
        if finite(start) and abs(start) > 0:
            points = [(x, y / start) for x, y in series(metrics, key)]
            lines.append(Line(key.removeprefix("image/").replace("_", " "), points))
    return line_chart("Pictures", lines, note="1: as in the first iterations", level=1.0)


def _equal(metrics: Metrics, first: str, second: str) -> bool:
    pairs = [(line[first], line[second]) for line in metrics if finite(line.get(first)) and finite(line.get(second))]
    return all(abs(a - b) <= SAME_CURVE * max(1.0, abs(a)) for a, b in pairs)


def _grid(charts: Any) -> str:
    html = "\n".join(chart for chart in charts if chart)
    return f'<div class="grid-of charts">{html}</div>' if html else ""
