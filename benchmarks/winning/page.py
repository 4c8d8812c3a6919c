"""index.html: the comparison as one self-contained page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from alignment.gains import finite, number, percent
from alignment.report.page import findings, page, pretty, section, table, tile
from alignment.report.videos import clip

from .charts import Bar, bars, distributions
from .judges import INDEPENDENT, TRAINED
from .measures import DYNAMIC, WORDS
from .models import BASE
from .plot import Scores
from .rates import Change, Rate
from .scoring import OVERALL
from .summary import Comparison, Row, better, rate_words, shown
from .vbench import RANGES, VBenchScores
from .videos import Video, paths_of

COLOUR = {TRAINED: 1, INDEPENDENT: 0}  # of the page's colours; others are grey
GREY = 5
MAX_TILES = 8
MAX_PAIRS = 8
MAX_BYTES = 24 * 2**20  # of all embedded videos, before base64 makes them a third larger


def render(
    settings: Mapping[str, Any],
    comparisons: Sequence[Comparison],
    scores: Sequence[Scores],
    videos: Sequence[Video],
    vbench: Mapping[str, VBenchScores],
    out: Path,
    command: str,
    versions: Mapping[str, str],
) -> str:
    """The whole page.

    Args:
        scores: of each comparison: judge -> base's and tuned's scores of the N videos, nan where masked.
        vbench: model -> its scores, of those that have some.
    """
    names = ", ".join(comparison.name for comparison in comparisons)
    prompts = len(settings["prompts"])
    lead = f"{names} against {settings['models'][BASE][0]}: {prompts} prompts, {settings['samples']} each, same noise"
    parts = [f'<header><h1>{escape(names)}</h1><p class="lead">{escape(lead)}</p>{_tiles(comparisons)}']
    parts += [f"<p>{pretty(comparison.verdict)}</p>" for comparison in comparisons]
    parts.append("</header>")
    for comparison, each in zip(comparisons, scores, strict=True):
        of = f": {comparison.name}" if len(comparisons) > 1 else ""
        parts += [
            section(f"Win rates{of}", _legend() + bars(_bars(shown(comparison.rows))), _bars_note()),
            section(f"What this says{of}", findings(comparison.findings)),
            section(f"Side by side{of}", *_pairs(comparison, each, videos, out)),
            section(f"Scores{of}", _histograms(each), "Of all videos; dashed: the mean."),
            section(f"Numbers{of}", _numbers(comparison.rows), _numbers_note()),
            section(f"Motion, diversity, pictures{of}", _measures(comparison.measures), _measures_note(settings)),
        ]
    parts.append(
        section("VBench", _vbench(vbench), "Normalised by the published ranges; Total is (4 Quality + Semantic) / 5.")
    )
    parts.append(section("Made with", _made_with(settings, command, versions)))
    parts.append(
        '<footer class="soft">Vote yourself: <a href="voting.html">voting.html</a>, blind and shuffled.</footer>'
    )
    return page(f"{names}: win rates", "\n".join(parts))


def _tiles(comparisons: Sequence[Comparison]) -> str:
    rows = [(c.name, row) for c in comparisons for row in c.totals]
    rows.sort(key=lambda pair: pair[1].relation != INDEPENDENT)
    several = len(comparisons) > 1
    tiles = []
    for name, row in rows[:MAX_TILES]:
        label = f"{row.judge}, {row.relation}" + (f": {name}" if several else "")
        between = f"{100 * row.rate.low:.0f} to {100 * row.rate.high:.0f}" if finite(row.rate.low) else "no interval"
        tiles.append(tile(label, percent(row.rate.rate), "won", f"{between}, p {p_words(row.rate.p)}"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _legend() -> str:
    kinds = (("independent", 0), ("trained on", 1), ("related, selected by, or not known", GREY))
    keys = "".join(f'<span><i class="k{colour}"></i>{name}</span>' for name, colour in kinds)
    return f'<div class="legend">{keys}</div>'


def _bars_note() -> str:
    return (
        "Share of pairs, of the same prompt and noise, that the tuned model wins; half of the ties count. "
        "Lines: 95 % intervals from resampled prompts; dashed: level. Thin bars: a judge's dimensions, where more wins."
    )


def _bars(rows: Sequence[Row]) -> list[Bar]:
    return [
        Bar(
            f"{row.judge} ({row.relation})" if row.dim == OVERALL else row.dim,
            row.rate.rate,
            row.rate.low,
            row.rate.high,
            rate_words(row.rate),
            COLOUR.get(row.relation, GREY),
            row.dim != OVERALL,
        )
        for row in rows
    ]


def _histograms(scores: Scores) -> str:
    figures = [
        distributions(judge, [("base", base, GREY), ("tuned", tuned, 0)]) for judge, (base, tuned) in scores.items()
    ]
    return f'<div class="grid-of charts">{"".join(figures)}</div>' if any(figures) else ""


def _numbers_note() -> str:
    return (
        "p: exact sign test, one vote a prompt. Spread of seeds: standard deviation between the samples of one prompt."
    )


def _numbers(rows: Sequence[Row]) -> str:
    several = any(len(row.by_sample) > 1 for row in rows)
    head = ["", "win rate", "95 %", "won", "tied", "lost", "p", "base", "tuned", "change", "95 %"]
    head += ["spread of seeds", "win rate by seed"] if several else []
    body = []
    for row in rows:
        label = f"{row.judge}, {row.relation}" if row.dim == OVERALL else row.dim
        cells = [(label, ""), *_rate_cells(row.rate), *_change_cells(row.change)]
        if several:
            spread = f"{number(row.seeds[0])}, {number(row.seeds[1])}" if row.seeds else ""
            seeds = [rate for rate in row.by_sample if finite(rate)]
            cells += [(spread, ""), (f"{min(seeds):.0%} to {max(seeds):.0%}" if seeds else "", "")]
        body.append(("dim" if row.dim != OVERALL else "", cells))
    return table(head, body)


def _rate_cells(rate: Rate) -> list[tuple[str, str]]:
    colour = {1: "up", -1: "down", 0: ""}[better(rate)]
    between = f"{rate.low:.0%} to {rate.high:.0%}" if finite(rate.low) else ""
    counts = [(str(count), "") for count in (rate.wins, rate.ties, rate.losses)]
    return [(percent(rate.rate), colour), (between, ""), *counts, (p_words(rate.p), "")]


def _change_cells(moved: Change | None) -> list[tuple[str, str]]:
    if moved is None or not moved.pairs:
        return [("", "")] * 4
    between = f"{number(moved.low, True)} to {number(moved.high, True)}" if finite(moved.low) else ""
    return [(number(moved.base), ""), (number(moved.tuned), ""), (number(moved.change, True), ""), (between, "")]


def p_words(p: float) -> str:
    """`0.03`, `2e-05`."""
    return f"{p:.1g}" if p < 0.995 else "1"


def _measures_note(settings: Mapping[str, Any]) -> str:
    return f"No judge is needed for these. Optical flow: {settings['flow']}; dynamic degree by VBench's rule on it."


def _measures(measures: Mapping[str, Change]) -> str:
    rows = []
    for key, moved in measures.items():
        cells = _change_cells(moved)
        if key == DYNAMIC:
            cells[:2] = [(percent(moved.base), ""), (percent(moved.tuned), "")]
        rows.append(("", [(WORDS[key], ""), *cells]))
    return table(["", "base", "tuned", "change", "95 %"], rows) if rows else ""


def _pairs(comparison: Comparison, scores: Scores, videos: Sequence[Video], out: Path) -> tuple[str, str]:
    """The first prompts' videos (HTML), and a note; the score below each is an independent judge's, if there is one."""
    order = sorted(comparison.totals, key=lambda row: row.relation != INDEPENDENT)
    judge = next((row.judge for row in order if row.judge in scores), None)
    cards, room = [], MAX_BYTES
    firsts = [place for place, video in enumerate(videos) if video.sample == 0]
    for place in firsts[:MAX_PAIRS]:
        files = [paths_of(out, name, videos[place].name)[0] for name in (BASE, comparison.name)]
        room -= sum(file.stat().st_size for file in files if file.is_file())
        if room < 0:
            break
        marks = [number(float(values[place])) for values in scores[judge]] if judge else ["", ""]
        clips = "".join(clip(*row) for row in zip((BASE, comparison.name), marks, files, strict=True))
        prompt = escape(videos[place].prompt.text)
        cards.append(f'<div class="pair">{clips}<p title="{prompt}">{prompt}</p></div>')
    which = f", below each the score by {judge}" if judge else ""
    note = f"The first {len(cards)} of {len(firsts)} prompts, not selected{which}."
    return f'<div class="grid-of pairs">{"".join(cards)}</div>' if cards else "", note


def _vbench(found: Mapping[str, VBenchScores]) -> str:
    if not found:
        return ""
    rows = []
    for key in ("total", "quality", "semantic"):
        values = [getattr(scores, key) for scores in found.values()]
        rows.append(("group", [(key.capitalize(), ""), *((_share(value), "") for value in values)]))
    for key in RANGES:
        if any(key in scores.normalised for scores in found.values()):
            values = [scores.normalised.get(key) for scores in found.values()]
            rows.append(("dim", [(key.replace("_", " "), ""), *((_share(value), "") for value in values)]))
    return table(["", *found], rows)


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}%"


def _made_with(settings: Mapping[str, Any], command: str, versions: Mapping[str, str]) -> str:
    said = {key: value for key, value in settings.items() if key not in ("prompts", "models")}
    said["models"] = ", ".join(f"{name} = {path} ({mark})" for name, (path, mark) in settings["models"].items())
    rows = [("", [(str(key), ""), (_words(value), "")]) for key, value in [*said.items(), *versions.items()]]
    return f"<pre>{escape(command)}</pre>{table([], rows, 'versions')}"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_words(inner)}" for key, inner in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
