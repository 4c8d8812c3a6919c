"""What is written of a benchmark run: figures as JSON, margins pair by pair, a page, a picture."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignment.versions import versions

from .data import Benchmark
from .fingerprints import hash_of
from .layouts import FORMATS
from .protocols import Answers, behind, headline, labels_in_words, labels_of
from .published import PUBLISHED
from .scoring import Scored

MAX_FAILED = 100  # failures that are listed


class Outcome(NamedTuple):
    """One reward's part."""

    scored: Scored
    answers: dict[str, Answers]  # dimension -> what came out

    @property
    def name(self) -> str:
        return self.scored.argument.name


def ranking(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Best first; one without any figure last."""
    return sorted(outcomes, key=lambda o: -headline(o.answers) if not math.isnan(headline(o.answers)) else math.inf)


def record(found: Benchmark, outcomes: Sequence[Outcome], command: str, ties: str) -> dict[str, Any]:
    """Everything that a result has to state, as JSON."""
    ranked = ranking(outcomes)
    return {
        "command": command,
        "date": time.strftime("%Y-%m-%d"),
        "versions": versions(),
        "data": {
            "format": found.format,
            "title": FORMATS[found.format].title,
            "file": str(found.file),
            "sha256": hash_of(found.file),
            "pairs": len(found.pairs),
            "named_pairs": found.named_pairs,
            "media": len({item.path for item in found.items}),
            "named_media": found.named,
            "missing_media": len(found.missing),
            "prompts": len(set(found.prompts)),
            "labels": labels_in_words(found),
        },
        "protocol": {"ties": ties, "intervals": "95 % bootstrap over prompts, thresholds kept"},
        "rewards": [_reward(outcome, ranked[0], found) for outcome in ranked],
        "published": [
            {"model": row.model, "source": row.source, "percent": {f"{m}/{d}": v for (m, d), v in row.values.items()}}
            for row in PUBLISHED.get(found.format, [])
        ],
    }


def _reward(outcome: Outcome, best: Outcome, found: Benchmark) -> dict[str, Any]:
    scored, failed = outcome.scored, list(outcome.scored.failed.items())
    return {
        "name": outcome.name,
        **scored.described,
        "fingerprint": scored.fingerprint,
        "scope": scored.scope,
        "headline": _number(headline(outcome.answers)),
        "behind_first": [_number(value) for value in behind(best.answers, outcome.answers, found.prompts)],
        "failed": len(failed),
        "failures": dict(failed[:MAX_FAILED]),
        "dimensions": {
            dim: {
                "compared": answer.source,
                **{
                    name: {
                        "accuracy": _number(m.value),
                        "low": _number(m.low),
                        "high": _number(m.high),
                        "pairs": m.pairs,
                        "unscored": m.unscored,
                        "chance": _number(m.chance),
                        "threshold": [_number(value) for value in m.threshold],
                    }
                    for name, m in answer.measures.items()
                },
            }
            for dim, answer in outcome.answers.items()
        },
    }


def margins(found: Benchmark, outcomes: Sequence[Outcome]) -> str:
    """A line of JSON for each pair: its media, labels, and every reward's margin."""
    labels = {dim: labels_of(found, dim) for dim in found.dims}
    lines = []
    for place, pair in enumerate(found.pairs):
        a, b = found.items[pair.a], found.items[pair.b]
        row = {
            "id": pair.record,
            "a": a.name,
            "b": b.name,
            "prompt": a.prompt,
            "labels": {
                dim: None if math.isnan(column[place]) else int(column[place]) for dim, column in labels.items()
            },
            "margins": {
                o.name: {dim: _number(answer.margins[place]) for dim, answer in o.answers.items()} for o in outcomes
            },
        }
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)


def write(path: Path, make: Callable[[Path], Any]) -> None:
    """Let `make` write a file, which appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".writing.{path.name}")
    make(unfinished)
    os.replace(unfinished, path)


def write_text(path: Path, text: str) -> None:
    write(path, lambda unfinished: unfinished.write_text(text, "utf-8"))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
