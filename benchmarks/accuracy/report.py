"""All that a run leaves behind, in one folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from .data import Benchmark
from .output import Outcome, margins, ranking, record, write, write_text
from .page import page_of
from .plot import plot


def write_report(folder: Path, found: Benchmark, outcomes: Sequence[Outcome], command: str, ties: str) -> None:
    """Write margins.jsonl, accuracy.png, accuracy.html and, last, accuracy.json."""
    ranked, result = ranking(outcomes), record(found, outcomes, command, ties)
    write_text(folder / "margins.jsonl", margins(found, outcomes))
    write(folder / "accuracy.png", lambda path: plot(found, ranked, path))
    write_text(folder / "accuracy.html", page_of(found, ranked, result))
    text = json.dumps(result, indent=1, ensure_ascii=False, default=str)
    write_text(folder / "accuracy.json", text + "\n")
