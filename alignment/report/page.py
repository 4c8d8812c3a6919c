"""The run report's looks: style sheet, page skeleton, and the small pieces of HTML that the sections are made of.

Whatever comes from a run (prompts, names, settings) is escaped here or where it is put into HTML; functions whose
arguments are HTML say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..gain_checks import Finding

STYLE = (
    """
:root { color-scheme: light; --ink: #1d2330; --soft: #626b7c; --rule: #e4e7ec; --wash: #f6f7f9;
  --c0: #2563c9; --c1: #e07b16; --c2: #14907a; --c3: #8b4fc4; --c4: #c8386b; --c5: #8a93a3; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); -webkit-text-size-adjust: 100%;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 44px 24px 72px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.015em; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 18px; letter-spacing: -.01em; margin: 52px 0 4px; }
p { margin: 0 0 8px; max-width: 76ch; }
small, .soft { color: var(--soft); font-size: 13px; font-weight: 400; }
.lead { color: var(--soft); font-size: 16px; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 12px; margin: 26px 0 22px; }
.tile { background: var(--wash); border-radius: 10px; padding: 14px 16px 12px; }
.tile span { display: block; color: var(--soft); font-size: 13px; overflow-wrap: anywhere; }
.tile b { display: block; font-size: 25px; line-height: 1.35; font-weight: 600; letter-spacing: -.02em;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.tile b small { font-size: 15px; letter-spacing: 0; }
.grid-of { display: grid; gap: 26px 28px; margin-top: 16px; }
.pairs { grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.pair { display: flex; flex-wrap: wrap; gap: 8px; align-content: flex-start; }
.pair p { flex-basis: 100%; margin: 0; font-size: 14px; line-height: 1.4; overflow-wrap: anywhere;
  display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 3; overflow: hidden; }
.clip { width: 161px; font-size: 13px; color: var(--soft); }
.clip video, .clip .missing { display: block; width: 100%; border-radius: 6px; background: var(--wash); }
.clip .missing { aspect-ratio: 1; padding: 12px; border: 1px dashed #c9ced8; overflow-wrap: anywhere; }
.clip video.tiny { image-rendering: pixelated; }
.clip div { display: flex; justify-content: space-between; padding: 3px 1px 0; }
.clip b { color: var(--ink); font-variant-numeric: tabular-nums; }
.findings { list-style: none; margin: 14px 0 0; padding: 0; max-width: 900px; }
.findings li { display: grid; grid-template-columns: 86px 1fr; gap: 12px; padding: 10px 0;
  border-top: 1px solid var(--rule); }
.findings p { margin: 0; }
.mark { font-size: 12px; font-weight: 600; line-height: 23px; display: flex;
  align-items: center; gap: 7px; align-self: start; }
.mark::before { content: ""; width: 9px; height: 9px; border-radius: 50%; background: currentColor; }
.alarm { color: #c0262d; } .warning { color: #b86a00; } .note { color: #5a6b8c; } .good { color: #12805c; }
.charts { grid-template-columns: repeat(auto-fill, minmax(310px, 1fr)); }
figure { margin: 0; min-width: 0; display: flex; flex-direction: column; }
figcaption { display: flex; justify-content: space-between; gap: 8px; font-size: 14px; font-weight: 600; }
figcaption span { overflow-wrap: anywhere; }
figcaption b { font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; margin-top: auto; padding-top: 4px; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 12.5px; color: var(--soft); }
.legend span { display: flex; align-items: center; gap: 6px; }
.legend i { width: 10px; height: 10px; border-radius: 3px; }
.grid line { stroke: #1d2330; stroke-opacity: .09; } .level { stroke: #8a93a3; stroke-dasharray: 4 3; }
.peak { fill: none; stroke: var(--ink); stroke-width: 1.2; } line.peak { stroke-dasharray: 2 3; stroke-opacity: .5; }
.grid text { font-size: 10.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.grid .y { text-anchor: end; } .grid .x { text-anchor: middle; }
.line { fill: none; stroke-width: 1.7; stroke-linejoin: round; stroke-linecap: round; }
.band { opacity: .12; stroke: none; } circle { stroke: #fff; stroke-width: 1; } .area { opacity: .82; }
.bar { display: flex; gap: 2px; height: 16px; margin: 14px 0 8px; border-radius: 5px; overflow: hidden;
  max-width: 760px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-top: 12px; font-size: 14px; font-variant-numeric: tabular-nums; }
td, th { padding: 4px 18px 4px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--rule); }
th { color: var(--soft); font-weight: 500; font-size: 13px; }
td:first-child, th:first-child { text-align: left; min-width: 220px; }
tr.group td { padding-top: 18px; font-weight: 600; } tr.dim td:first-child { padding-left: 18px; color: var(--soft); }
.versions td:first-child { min-width: 120px; color: var(--soft); }
.versions td { text-align: left; white-space: normal; }
td.up { color: #12805c; font-weight: 600; } td.down { color: #c0262d; font-weight: 600; }
details { margin-top: 16px; } summary { cursor: pointer; color: var(--c0); }
pre { background: var(--wash); border-radius: 8px; padding: 14px 16px; overflow-x: auto;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "Liberation Mono", monospace; }
footer { margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--rule); }
@media print { .pair, figure, li { break-inside: avoid; } details > pre { white-space: pre-wrap; } }
"""
    + "".join(f".c{i} {{ stroke: var(--c{i}); }} " for i in range(6))
    + "".join(
        f".band.c{i}, .area.c{i}, circle.c{i} {{ fill: var(--c{i}); }} .k{i} {{ background: var(--c{i}); }} "
        for i in range(6)
    )
)


def page(title: str, body: str) -> str:
    """A whole document around a body of HTML."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def section(title: str, html: str, note: str = "") -> str:
    """A headed part of the page around HTML; "" if that is empty."""
    small = f'<p class="soft">{pretty(note)}</p>' if note else ""
    return f"<section>\n<h2>{escape(title)}</h2>\n{small}{html}\n</section>\n" if html else ""


def pretty(text: str) -> str:
    """Plain words as HTML: escaped, with a real plus-minus sign, and `settings` in code type."""
    pieces = escape(text).replace("+-", "&#177;").split("`")
    if len(pieces) % 2 == 0:  # an unmatched backtick is the user's own
        return "`".join(pieces)
    return "".join(f"<code>{piece}</code>" if i % 2 else piece for i, piece in enumerate(pieces))


def tile(label: str, value: str, small: str, below: str) -> str:
    """One figure of the headline: a label, a big value with a small addition, and a line below."""
    addition = f" <small>{pretty(small)}</small>" if small else ""
    figure = f"<b>{pretty(value)}{addition}</b>"
    return f'<div class="tile"><span>{escape(label)}</span>{figure}<span>{pretty(below)}</span></div>'


def table(head: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[str, str]]]], kind: str = "") -> str:
    """A table of plain words. rows: (class of the row, cells of (text, class))."""
    titles = "".join(f"<th>{pretty(text)}</th>" for text in head)
    body = "".join(
        f"<tr{_class(row)}>" + "".join(f"<td{_class(cell)}>{pretty(text)}</td>" for text, cell in cells) + "</tr>"
        for row, cells in rows
    )
    top = f"<thead><tr>{titles}</tr></thead>" if head else ""
    return f'<div class="scroll"><table{_class(kind)}>{top}<tbody>{body}</tbody></table></div>'


def findings(found: Iterable[Finding]) -> str:
    """A list of what the numbers say, each with its level; "" of nothing."""
    items = "".join(
        f'<li><span class="mark {finding.level}">{finding.level}</span>'
        f"<p><strong>{pretty(finding.title)}.</strong> {pretty(finding.text)}</p></li>"
        for finding in found
    )
    return f'<ul class="findings">{items}</ul>' if items else ""


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""
