"""The page: one HTML file that holds everything, in the looks of the run report."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from alignment.report.charts import Line, line_chart
from alignment.report.page import page, pretty, section, table, tile
from rewards.contract import RewardError
from rewards.video_files import read_video

from .charts import Bar, bars, histogram, histogram_legend
from .data import Benchmark, Item, Pair
from .layouts import FORMATS
from .metrics import threshold_curve
from .output import Outcome
from .protocols import TITLES, behind, headline, labels_of
from .published import PUBLISHED
from .terminal import coverage, notes, percent, points, share

STYLE = """<style>
svg.bars { margin-top: 6px; } .sides { grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); }
 svg.bars text { font-size: 12px; fill: var(--ink); }
svg.bars .title { font-weight: 600; } svg.bars .name { text-anchor: end; fill: var(--soft); }
svg.bars .value { font-variant-numeric: tabular-nums; } svg.bars .x { font-size: 10.5px; fill: var(--soft); }
.whisker { fill: none; stroke: var(--ink); stroke-width: 1.1; } .chance { stroke: var(--ink); stroke-dasharray: 2 2; }
rect.area { stroke: none; } .faint { opacity: .35; }
.wrong { grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); }
.wrong .clip { width: 48%; } .wrong img { display: block; width: 100%; border-radius: 6px; background: var(--wash); }
.wrong img.tiny { image-rendering: pixelated; }
.wrong .liked img { outline: 3px solid #14907a; outline-offset: -3px; }
table.facts td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
table.facts td:first-child, .cells td:first-child, .cells th:first-child { min-width: 130px; }
.cells td, .cells th { padding-right: 14px; } .cells tr.group td { padding-top: 10px; font-weight: inherit; }
.cells tr.group td:first-child { font-weight: 600; } .cells td.words { text-align: left; color: var(--soft); }
tr.ours td { background: #eef4fd; font-weight: 600; } p.sources { max-width: none; margin-top: 10px; }
</style>"""
WORST = 6  # disagreements that are shown
THUMBNAIL = 200  # pixels of width
SCALES = 2  # rewards whose margins and disagreements are shown in full
TIES = {
    "realisable": "With ties: a pair is called a tie where the margin is at most a threshold, the one that fits these "
    "labels best (arXiv 2305.14324); all pairs of the same margin are on one side of it.",
    "held-out": "With ties: the threshold for each half of the prompts is the one that fits the other half best.",
    "official": "With ties as VideoAlign's own script counts: pairs become ties one by one, so that the value depends "
    "on the order of the rows; invalid labels count as wrong.",
}


def page_of(found: Benchmark, ranked: Sequence[Outcome], result: Mapping[str, Any]) -> str:
    """The whole document."""
    title = FORMATS[found.format].title
    body = [
        STYLE,
        f"<h1>Reward accuracy: {escape(title)}</h1>",
        f'<p class="lead">{escape(_lead(found, ranked))}</p>',
        _tiles(found, ranked),
        section("Ranking", _ranking(found, ranked), _protocol(found, result["protocol"]["ties"])),
        section("Accuracy", _bars(found, ranked), "In percent; whisker: 95 % interval; dashed: chance."),
        section("Beside published figures", _published(found, ranked), _published_note(found)),
        section(
            "Margins", _margins(found, ranked), "Of the first rewards: by how much they prefer what people prefer."
        ),
        section(
            "Where ties begin", _curves(found, ranked), "Accuracy over all labels, by the share of pairs called a tie."
        ),
        *itertools.islice(filter(None, (_worst(found, outcome) for outcome in ranked)), SCALES),
        section("Data", _data(found, result["data"])),
        section("How this was made", _made(ranked, result)),
    ]
    return page(f"Reward accuracy: {title}", "\n".join(filter(None, body)))


def _lead(found: Benchmark, ranked: Sequence[Outcome]) -> str:
    figures = [(outcome.name, share(headline(outcome.answers))) for outcome in ranked]
    said = [f"{name} agrees with people in {value} %" for name, value in figures if value]
    ends = said if len(said) < 3 else [said[0], said[-1]]
    return ". ".join([coverage(found), *([", ".join(ends)] if ends else [])]) + "."


def _tiles(found: Benchmark, ranked: Sequence[Outcome]) -> str:
    tiles = []
    for outcome in ranked[:3]:
        answer = outcome.answers.get("Overall") or next(iter(outcome.answers.values()))
        measured = next(iter(answer.measures.values()))
        around = "" if math.isnan(measured.low) else f"95 % {100 * measured.low:.1f} to {100 * measured.high:.1f}"
        value = share(headline(outcome.answers)) or "none"
        single = "Overall" in outcome.answers or len(outcome.answers) == 1
        tiles.append(tile(outcome.name, value, "%", around if single else f"mean of {', '.join(outcome.answers)}"))
    seen = len({item.path for item in found.items})
    tiles.append(tile("pairs", f"{len(found.pairs):,}", "", f"{seen:,} media, {len(set(found.prompts)):,} prompts"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _protocol(found: Benchmark, ties: str) -> str:
    first = "Without ties: pairs that people decided; equal scores and failed ones are wrong."
    if found.format == "mj_bench_video":
        words = "Pairs that people decided. Strict: equal scores are wrong; tie-aware: they count half."
        return f"{words} Failed ones are wrong."
    if found.format == "hpdv2":
        return "1 minus the share of pairs in the wrong order, mean over prompts; ties of people are right."
    if found.format == "image_reward":
        return f"{first} By pair as in ImageReward's test.py, and as a mean over prompts as in HPSv2's."
    rule = " VideoScore's rule: a tie of people is right where the margin is below 0.5, others compare strictly."
    four = " Accuracy in four classes is not defined for numbers, which do not tell two good videos from two bad ones."
    return f"{first} {TIES[ties]}{rule + four if found.format == 'genai_bench' else ''}"


def _ranking(found: Benchmark, ranked: Sequence[Outcome]) -> str:
    measures = list(next(iter(ranked[0].answers.values())).measures)
    several = len(ranked) > 1
    head = ["", "", *found.dims, *["behind the first"] * several]
    rows = []
    for place, outcome in enumerate(ranked):
        for number, name in enumerate(measures):
            cells = [(outcome.name if not number else "", ""), (TITLES[name], "words")]
            cells += [(percent(outcome.answers[dim].measures[name]), "") for dim in found.dims]
            lag = behind(ranked[0].answers, outcome.answers, found.prompts) if place and not number else None
            cells += [(points(lag) if lag else "", "")] * several
            rows.append(("group" if not number else "", cells))
    for number, name in enumerate(measures):
        chances = [(share(ranked[0].answers[dim].measures[name].chance), "") for dim in found.dims]
        cells = [("chance" if not number else "", ""), (TITLES[name], "words"), *chances, *([("", "")] * several)]
        rows.append(("dim", cells))
    lines = [f"<b>{escape(o.name)}</b>: {escape(line)}" for o in ranked for line in notes(o)]
    return table(head, rows, "cells") + "".join(f'<p class="soft">{line}</p>' for line in lines)


def _bars(found: Benchmark, ranked: Sequence[Outcome]) -> str:
    figures = []
    for name in next(iter(ranked[0].answers.values())).measures:
        groups = []
        for dim in found.dims:
            measured = [(o.name, o.answers[dim].measures[name]) for o in ranked]
            group = [Bar(who, m.value, m.low, m.high, m.chance, i) for i, (who, m) in enumerate(measured)]
            groups.append((dim, group))
        caption = f"<figcaption><span>{escape(TITLES[name])}</span></figcaption>"
        figures.append(f"<figure>{caption}{bars(groups, TITLES[name])}</figure>")
    return f'<div class="grid-of sides">{"".join(figures)}</div>'


def _published(found: Benchmark, ranked: Sequence[Outcome]) -> str:
    rows = PUBLISHED.get(found.format, [])
    there = {column for row in rows for column in row.values}
    measures = next(iter(ranked[0].answers.values())).measures
    columns = [(name, dim) for name in measures for dim in found.dims if (name, dim) in there]
    if not columns:
        return ""
    body = []
    for outcome in ranked:
        cells = [(share(outcome.answers[dim].measures[name].value), "") for name, dim in columns]
        body.append(("ours", [(outcome.name, ""), *cells]))
    for row in sorted(rows, key=lambda row: -row.values.get(columns[0], 0)):
        cells = [(f"{row.values[column]:g}" if column in row.values else "", "") for column in columns]
        body.append(("", [(row.model, ""), *cells]))
    sources: dict[str, list[str]] = {}
    for row in rows:
        sources.setdefault(row.source, []).append(row.model)
    words = "; ".join(f"{', '.join(models)}: {source}" for source, models in sources.items())
    head = ["", *(f"{dim} {TITLES[name]}" for name, dim in columns)]
    return table(head, body, "cells") + f'<p class="soft sources">Highlighted: this run. {escape(words)}.</p>'


def _published_note(found: Benchmark) -> str:
    words = "Published figures are of the whole data set and not all of one protocol: compare them with care."
    if found.format == "mj_bench_video":
        words += " Of its 1,085 pairs 118 are decided, so that an interval is about 9 points to either side."
    return words


def _margins(found: Benchmark, ranked: Sequence[Outcome]) -> str:
    charts = [
        histogram(f"{outcome.name}, {dim}", labels_of(found, dim), answer.margins)
        for outcome in ranked[:SCALES]
        for dim, answer in outcome.answers.items()
    ]
    return f'{histogram_legend()}<div class="grid-of charts">{"".join(charts)}</div>' if any(charts) else ""


def _curves(found: Benchmark, ranked: Sequence[Outcome]) -> str:
    if "with_ties" not in next(iter(ranked[0].answers.values())).measures:
        return ""
    charts = []
    for dim in found.dims:
        labels = labels_of(found, dim)
        if np.isnan(labels).all():
            continue
        lines = [
            Line(o.name, threshold_curve(labels, o.answers[dim].margins), colour=i % 6) for i, o in enumerate(ranked)
        ]
        charts.append(line_chart(dim, lines, level=100 * ranked[0].answers[dim].measures["with_ties"].chance))
    return f'<div class="grid-of charts">{"".join(charts)}</div>'


def _worst(found: Benchmark, outcome: Outcome) -> str:
    """The pairs on which a reward is surest of the opposite of what people said."""
    wrong = []
    for dim, answer in outcome.answers.items():
        against = -labels_of(found, dim) * answer.margins
        spread = float(np.nanstd(answer.margins)) if not np.isnan(answer.margins).all() else 0.0
        wrong += [(value / (spread or 1.0), dim, place) for place, value in enumerate(against) if value > 0]
    cards, seen = [], set()
    for _, dim, place in sorted(wrong, reverse=True):
        pair = found.pairs[place]
        if (pair.a, pair.b) in seen:
            continue
        seen.add((pair.a, pair.b))
        cards.append(_card(found, outcome, dim, place))
        if len(cards) == WORST:
            break
    note = f"Pairs on which `{outcome.name}` is surest of the opposite; framed: what people prefer. Middle frames."
    html = f'<div class="grid-of wrong">{"".join(cards)}</div>' if cards else ""
    return section(f"Worst disagreements of {outcome.name}", html, note)


def _card(found: Benchmark, outcome: Outcome, dim: str, place: int) -> str:
    pair: Pair = found.pairs[place]
    answer, both = outcome.answers[dim], outcome.scored.readings[place]
    likes_first = labels_of(found, dim)[place] > 0
    sides = []
    for item, liked, reading in (
        (found.items[pair.a], likes_first, both[0]),
        (found.items[pair.b], not likes_first, both[1]),
    ):
        look = "clip liked" if liked else "clip"
        name = escape(item.model or Path(item.name).name)
        sides.append(
            f'<div class="{look}">{_thumbnail(item)}'
            f"<div><span>{name}</span><b>{reading[answer.source]:.3g}</b></div></div>"
        )
    prompt = escape(found.items[pair.a].prompt)
    words = f"<b>{escape(dim)}</b>, margin {answer.margins[place]:+.3g}: {prompt}"
    return f'<div class="pair">{"".join(sides)}<p title="{prompt}">{words}</p></div>'


def _thumbnail(item: Item) -> str:
    """The middle frame as a small JPEG in the page."""
    from PIL import Image

    try:
        frames, _ = read_video(item.path, item.fps)
    except RewardError:
        return '<div class="missing">cannot be read</div>'
    image = Image.fromarray(frames[len(frames) // 2].permute(1, 2, 0).numpy())
    tiny = ' class="tiny"' if image.width < 128 else ""
    image.thumbnail((THUMBNAIL, 2 * THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f'<img{tiny} alt="" src="data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}">'


def _data(found: Benchmark, facts: Mapping[str, Any]) -> str:
    missing = found.missing[:20]
    rows = [
        ("file", f"{facts['file']}, sha256 {facts['sha256']}"),
        ("media", f"{facts['media']} scored of {facts['named_media']} named"),
        ("missing", f"{facts['missing_media']}: {', '.join(missing)}" if missing else "none"),
    ]
    for dim, counts in facts["labels"].items():
        words = f"{counts['first']} first better, {counts['second']} second better, {counts['tie']} ties"
        rows.append((dim, words + (f", {counts['invalid']} invalid" if counts["invalid"] else "")))
    distinct = len({(pair.a, pair.b) for pair in found.pairs})
    if distinct < len(found.pairs):
        rows.append(("repeated", f"{len(found.pairs)} rows are {distinct} different pairs; each row counts"))
    return table([], [("", [(name, ""), (words, "")]) for name, words in rows], "facts")


def _made(ranked: Sequence[Outcome], result: Mapping[str, Any]) -> str:
    rows = [("date", result["date"]), *((name, str(value)) for name, value in result["versions"].items())]
    for outcome in ranked:
        described = outcome.scored.described
        files = ", ".join(f"{path} {digest}" for path, digest in described["files"].items())
        words = f"{described['use']} {json.dumps(described['options'], default=str)}"
        rows.append((outcome.name, words + (f"; sha256 of {files}" if files else "")))
    failures = [f"{o.name}: {name}: {why}" for o in ranked for name, why in list(o.scored.failed.items())[:50]]
    names = escape("\n".join(failures))
    listed = f"<details><summary>{len(failures)} without a score</summary><pre>{names}</pre></details>"
    command = f"<pre>{escape(result['command'])}</pre>"
    facts = table([], [("", [(name, ""), (words, "")]) for name, words in rows], "facts")
    return (
        command
        + facts
        + (listed if failures else "")
        + f'<p class="soft">{pretty("Pair by pair: `margins.jsonl`.")}</p>'
    )
