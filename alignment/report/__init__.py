"""The run report: one HTML page that says what a run did, made from the run's folder alone.

    python -m alignment.report RUN_FOLDER        writes RUN_FOLDER/report.html again

The page needs no network and no other file: curves are inline SVG, videos are embedded. It is made from config.yaml,
metrics.jsonl and samples/*/scores.json with their videos; each may be missing, and a run that was killed in the middle
of a line or a file still has its report.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ..diagnostics import diagnose
from ..gains import (
    SIGNIFICANT_Z,
    Paired,
    compare,
    decompose,
    finite,
    first_and_last,
    interval_words,
    mean,
    number,
    peak,
    percent,
    summary,
    z_words,
)
from ..logs import ENDS, column, lately, phase_seconds
from ..settings import given_labels, reward_words, value_of
from .charts import share_bar
from .curves import PHASES, accuracy_curves, dimension_curves, health_curves, pair_curves, reward_curves
from .folder import Run, load_run
from .page import findings, page, pretty, section, table, tile
from .videos import video_pairs

__all__ = ["Run", "load_run", "render", "write_report"]

MAX_TILES_HELD_OUT = 2  # the table has every held-out reward
RANKED = "eval/accuracy/mean"  # where a reward is trained


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, all at once (a reader never sees half a page).

    Raises: ValueError if the folder is no run.
    """
    loaded = load_run(run)
    path = loaded.folder / "report.html"
    aside = path.with_name(f".report.{os.getpid()}.tmp")
    try:
        aside.write_text(render(loaded), encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def render(run: Run) -> str:
    """The whole page."""
    name = str(run.config.get("name") or run.folder.resolve().name)
    ranking = accuracy_curves(run.metrics)
    start = [line for line in run.metrics if line["iteration"] == 0]  # where a reward is trained, its first evaluation
    run = run._replace(metrics=run.metrics[len(start) :])
    dimensions = dimension_curves(run.metrics, run.evaluations)
    folded = f"<details><summary>Single dimensions of the rewards</summary>{dimensions}</details>" if dimensions else ""
    rewards = reward_curves(run.metrics, run.evaluations, _held_out(run), trained=not given_labels(run.config))
    videos, which = video_pairs(run.evaluations)
    footer = f"Could not be read and was left out: {', '.join(run.unreadable)}." if run.unreadable else ""
    body = [
        _headline(run, name, start),
        section("Before and after" if len(run.evaluations) > 1 else "Samples", videos, which),
        section("Diagnostics", findings(diagnose(run.metrics, run.evaluations, run.config))),
        section("Ranking", ranking, "Over iterations, of the pairs with a better one; half is chance."),
        section("Rewards", rewards + folded, "Over iterations. Evaluations repeat the same prompts and noise."),
        section("Pairs", pair_curves(run.metrics), "Over iterations."),
        section("Evaluation", *_values(run)),
        section("Training", health_curves(run.metrics), "Over iterations."),
        section("Time", _time(run.metrics)),
        section("Configuration", _configuration(run)),
        f'<footer class="soft">Reelign run report of {escape(str(run.folder))}. {escape(footer)}</footer>',
    ]
    return page(f"{name}: run report", "\n".join(body))


def _headline(run: Run, name: str, start: Sequence[Mapping[str, Any]] = ()) -> str:
    rewards, preferences = _trained(run), given_labels(run.config)
    parts = [
        label(run.config.get("algorithm")),
        f"on {label(run.config.get('model'))}" if run.config.get("model") else "",
        f"trained on {preferences}" if preferences else f"trained for {rewards}" if rewards else "",
    ]
    lead = " ".join(part for part in parts if part)
    if "seed" in run.config:
        lead += f"{', ' if lead else ''}seed {run.config['seed']}"
    sentences = summary(run.evaluations, reward_words(run.config))
    best = peak(run.evaluations)
    if best and value_of(run.config, "patience") and best[0] != run.evaluations[-1]["iteration"]:
        sentences.append(f"The saved weights are those of iteration {best[0]}, where it peaked at {number(best[1])}.")
    ranked = column([*start, *run.metrics], RANKED)
    if ranked:
        before = f", {percent(ranked[0])} before training" if start and len(ranked) > 1 else ""
        sentences = [f"Of the held-out pairs {percent(ranked[-1])} are ranked right{before}."]
    elif len(run.evaluations) < 2 and run.metrics:
        what = "training rewards" if column(run.metrics, "reward/mean") else "training"
        sentences = [f"The run has no evaluation after training yet, so only its {what} can be shown."]
    elif not run.metrics and not run.evaluations:
        sentences = ["Nothing has been logged yet."]
    words = "".join(f"<p>{pretty(sentence[:1].upper() + sentence[1:])}</p>" for sentence in sentences)
    tiles = "".join(_tiles(run))
    grid = f'<div class="tiles">{tiles}</div>' if tiles else ""
    return f'<header>\n<h1>{escape(name)}</h1>\n<p class="lead">{escape(lead)}</p>\n{grid}{words}\n</header>'


def _tiles(run: Run) -> list[str]:
    tiles = []
    ends = first_and_last(run.evaluations)
    if ends:
        changes = compare(*ends)
        names = ends[1].get("held_out", [])[:MAX_TILES_HELD_OUT]
        tiled = {"mean": reward_words(run.config).capitalize()} | {name: f"Held out: {name}" for name in names}
        for key, title in tiled.items():
            if (change := changes.get(f"reward/{key}")) and change.num:
                tiles.append(_gain_tile(title, change))
        gains = [gain for name in ends[1].get("trained", {}) if (gain := decompose(*ends, name))]
        if gains:
            worst = min(gains, key=lambda gain: gain.validity.after)
            below = f"{percent(worst.validity.before)} before, {worst.both_valid.num} prompts valid both times"
            tiles.append(tile("Valid clips", percent(worst.validity.after), "", below))
    elif rewards := column(run.metrics, "reward/mean"):
        first, last = mean(rewards[:ENDS]), mean(rewards[-ENDS:])
        below = f"{number(first)} to {number(last)}, ends averaged over {min(ENDS, len(rewards))}"
        tiles.append(tile("Training reward", number(last - first, signed=True), "", below))
    if ranked := column(run.metrics, RANKED):
        below = f"of those held out, half is chance; at best {percent(max(ranked))}"
        tiles.append(tile("Pairs ranked right", percent(ranked[-1]), "", below))
    if accuracy := column(run.metrics, "implicit_accuracy"):
        held_out = column(run.metrics, "eval/pairs/implicit_accuracy")
        of = f"{percent(held_out[-1])} of those held out" if held_out else "of the training pairs"
        below = f"{of}, half is chance; over the last {max(1, len(accuracy) // 3)} iterations"
        tiles.append(tile("Pairs told apart", percent(lately(run.metrics, "implicit_accuracy")), "", below))
    seconds = _seconds(run.metrics)
    if seconds > 0:
        below = f"{len(run.metrics)} iterations, {number(seconds / len(run.metrics))} s each"
        tiles.append(tile("Training time", duration(seconds), "", below))
    return tiles


def _gain_tile(title: str, change: Paired) -> str:
    small = f"+- {number(change.stderr)}" if finite(change.stderr) else ""
    sure = [f"z {z_words(change.z)}"] if finite(change.z) else []
    sure += [words] if (words := interval_words(change)) else []
    below = ", ".join([f"{number(change.before)} to {number(change.after)}", *sure, f"{change.num} prompts"])
    return tile(title, number(change.change, signed=True), small, below)


def _values(run: Run) -> tuple[str, str]:
    """The table of all evaluated values (HTML) and the note above it."""
    evaluations = run.evaluations
    if not evaluations:
        return "", ""
    ends = first_and_last(evaluations)
    last = evaluations[-1]
    changes = compare(*ends) if ends else {}
    rows = []
    for title, keys in _groups(last, f"{reward_words(run.config).capitalize()}s").items():
        rows.append(("group", [(title, "")] + [("", "")] * (6 if ends else 1)))
        for key in keys:
            kind = "dim" if key.count("/") == 2 else ""
            text = "weighted sum" if key == "reward/mean" else key.split("/")[-1].replace("_", " ")
            if not ends:
                rows.append((kind, [(text, ""), (number(mean([v for v in last["values"][key] if finite(v)])), "")]))
            elif key in changes:
                rows.append((kind, [(text, ""), *_cells(changes[key], key)]))
    num = len(last.get("prompts", []))
    if ends:
        note = (
            f"Means over {num} prompts with the same seeds. Of the paired change: the 95 % interval from resampled "
            "prompts, the standard error, and the change in standard errors (z)."
        )
        return table(["", "before", "after", "change", "95 %", "standard error", "z"], rows), note
    return table(["", f"iteration {last['iteration']}"], rows), f"Means over {num} prompts."


def _cells(change: Paired, key: str) -> list[tuple[str, str]]:
    colour = ""
    if key.startswith("reward/") and key.count("/") == 1 and abs(change.z) >= SIGNIFICANT_Z:
        colour = "up" if change.change > 0 else "down"
    values = [(number(change.before), ""), (number(change.after), ""), (number(change.change, signed=True), colour)]
    between = f"{number(change.low, signed=True)} to {number(change.high, signed=True)}"
    return [*values, (between, ""), (number(change.stderr), ""), (z_words(change.z), "")]


def _groups(evaluation: Mapping[str, Any], heading: str) -> dict[str, list[str]]:
    """Keys of the values by heading (that of rewards that count), each reward followed by its dimensions."""
    held_out = set(evaluation.get("held_out", []))
    keys = list(evaluation["values"])
    totals = [key for key in keys if key.startswith("reward/") and key.count("/") == 1]
    trained = [key for key in totals if key.split("/")[1] in evaluation.get("trained", {})]
    if len(trained) == 1 and evaluation["values"].get("reward/mean") == evaluation["values"][trained[0]]:
        totals.remove("reward/mean")  # the weighted sum of one reward says nothing new
    groups: dict[str, list[str]] = {heading: [], "Held-out rewards": [], "Pictures": []}
    for total in totals:
        title = "Held-out rewards" if total.split("/")[1] in held_out else heading
        groups[title] += [total, *(key for key in keys if key.startswith(f"{total}/"))]
    groups["Pictures"] = [key for key in keys if key.startswith("image/")]
    return {title: members for title, members in groups.items() if members}


def _seconds(metrics: Sequence[Mapping[str, Any]]) -> float:
    return max(sum(column(metrics, "time/iteration")), sum(phase_seconds(metrics).values()))


def _time(metrics: Sequence[Mapping[str, Any]]) -> str:
    phases = phase_seconds(metrics)
    total = _seconds(metrics)
    if not phases:
        return ""
    words = [f"{len(metrics)} iterations in {duration(total)}, {number(total / len(metrics))} s each."]
    evaluations = column(metrics, "nfe")
    if evaluations:
        words.append(f"{sum(evaluations):,.0f} function evaluations, {mean(evaluations):,.0f} an iteration.")
    rate = column(metrics, "samples_per_second")
    if rate:
        words.append(f"{number(mean(rate))} samples a second.")
    shares = [(f"{name} {s / total:.0%} ({duration(s)})", s, PHASES[name]) for name, s in phases.items()]
    return f"<p>{escape(' '.join(words))}</p>{share_bar(shares)}"


def _configuration(run: Run) -> str:
    versions = run.config.get("versions")
    html = ""
    if isinstance(versions, Mapping):
        rows = [("", [(str(key).replace("_", " "), ""), (str(value), "")]) for key, value in versions.items()]
        html = table([], rows, "versions")
    if run.config_text.strip():
        html += f"<details><summary>config.yaml</summary><pre>{escape(run.config_text)}</pre></details>"
    return html


def _held_out(run: Run) -> list[str]:
    if run.evaluations:
        return list(run.evaluations[-1].get("held_out", []))
    rewards = run.config.get("rewards")
    rewards = rewards if isinstance(rewards, Mapping) else {}
    return [name for name, reward in rewards.items() if isinstance(reward, Mapping) and reward.get("weight") == 0]


def _trained(run: Run) -> str:
    if run.evaluations:
        return ", ".join(run.evaluations[-1].get("trained", {}))
    rewards = run.config.get("rewards")
    return ", ".join(name for name in rewards if name not in _held_out(run)) if rewards else ""


def label(value: Any) -> str:
    """A few words for one part of a recipe, whatever its form."""
    if isinstance(value, Mapping):
        for key in ("name", "kind", "id", "path", "model", "pipeline"):
            if value.get(key):
                return label(value[key])
        return ", ".join(map(str, value))
    if isinstance(value, list | tuple):
        return ", ".join(map(label, value))
    return "" if value is None else str(value)


def duration(seconds: float) -> str:
    """`42 s`, `3 min 5 s`, `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"
