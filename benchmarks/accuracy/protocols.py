"""What is counted on which benchmark, and which of a reward's numbers answers which question.

P pairs
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import metrics
from .cache import Reading
from .data import OVERALL, Benchmark
from .metrics import Array

TIES = ("realisable", "held-out", "official")
ALIKE = (  # names of one question in data sets and rewards, in small letters
    {"vq", "fineness", "quality", "visual quality", "visual_quality"},
    {"mq", "motion", "coherence & consistency", "motion quality", "motion_quality"},
    {"ta", "alignment", "text alignment", "text_alignment"},
)
TOTAL = "total"
TITLES = {
    "without_ties": "without ties",
    "with_ties": "with ties",
    "video_score_rule": "VideoScore's rule",
    "strict": "strict",
    "tie_aware": "tie-aware",
    "ranking": "ranking",
    "by_pair": "by pair",
    "by_prompt": "mean over prompts",
}


class Measured(NamedTuple):
    """One figure."""

    value: float  # 0 to 1
    low: float  # 95 % interval
    high: float
    pairs: int  # that count
    unscored: int  # of them, that count as wrong for want of a score
    chance: float  # of margins that know nothing; NaN where that depends on the scale
    threshold: list[float]  # where ties begin, one or two
    correct: Array  # (P,)
    weights: Array  # (P,)


class Answers(NamedTuple):
    """What a reward said to one dimension."""

    source: str  # its number that was compared: "total" or one of its dims
    margins: Array  # (P,)
    measures: dict[str, Measured]


def evaluate(found: Benchmark, readings: Sequence[tuple[Reading, Reading] | None], ties: str) -> dict[str, Answers]:
    """Dimension -> what comes out, for one reward.

    Args:
        readings: of each pair, what the reward said of the first and the second.
        ties: one of TIES, how "with ties" is counted.
    """
    dims = dict.fromkeys(name for both in readings if both for name in both[0])
    answers = {}
    for dim in found.dims:
        source = source_of(dim, dims)
        margins = np.array([_margin(both, source) for both in readings], dtype=np.float64)
        labels = labels_of(found, dim)
        answers[dim] = Answers(source, margins, _measures(found, labels, margins, ties))
    return answers


def labels_of(found: Benchmark, dim: str) -> Array:
    """(P,) 1, -1, 0, and NaN where a label is invalid or there is none."""
    labels = [pair.labels.get(dim) for pair in found.pairs]
    return np.array([math.nan if label is None else label for label in labels], dtype=np.float64)


def source_of(dim: str, dims: Iterable[str]) -> str:
    """A reward's dim of the same name or meaning; for Overall, and where it has none, its total."""
    names = {name.lower(): name for name in dims if name != TOTAL}
    if dim == OVERALL:
        return TOTAL
    alike = next((words for words in ALIKE if dim.lower() in words), set())
    return next((names[word] for word in [dim.lower(), *sorted(alike)] if word in names), TOTAL)


def _margin(both: tuple[Reading, Reading] | None, source: str) -> float:
    return math.nan if both is None else both[0].get(source, math.nan) - both[1].get(source, math.nan)


def _measures(found: Benchmark, h: Array, m: Array, ties: str) -> dict[str, Measured]:
    records, prompts = [pair.record for pair in found.pairs], found.prompts

    def measured(correct: Array, chance: float, threshold: Sequence[float] = (), weights: Array | None = None):
        counts = ~np.isnan(correct)
        value, around = metrics.mean(correct, weights), metrics.interval(correct, prompts, weights)
        weights = np.ones(len(correct)) if weights is None else weights
        unscored = int((counts & np.isnan(m)).sum())
        return Measured(value, *around, int(counts.sum()), unscored, chance, list(threshold), correct, weights)

    plain = metrics.without_ties(h, m)
    if found.format == "mj_bench_video":
        return {"strict": measured(plain, 0.5), "tie_aware": measured(metrics.tie_aware(h, m), 0.5)}
    if found.format == "hpdv2":
        correct = metrics.ranked(h, m)
        weights = metrics.per_record(correct, records)
        return {"ranking": measured(correct, metrics.chance_ranked(h, weights), (), weights)}
    if found.format == "image_reward":
        weights = metrics.per_record(plain, records)
        return {"by_pair": measured(plain, 0.5), "by_prompt": measured(plain, 0.5, (), weights)}
    if ties == "official":
        plain = metrics.official_without_ties(h, m)
    with_ties, threshold = TIE_RULES[ties](h, m, prompts)
    chance = metrics.chance_with_ties(h)
    measures = {"without_ties": measured(plain, 0.5), "with_ties": measured(with_ties, chance, threshold)}
    if found.format == "genai_bench":
        measures["video_score_rule"] = measured(metrics.video_score_rule(h, m), math.nan, [metrics.VIDEO_SCORE_BAND])
    return measures


def _realisable(h: Array, m: Array, prompts: Sequence[str]) -> tuple[Array, list[float]]:
    threshold = metrics.best_threshold(h, m)
    return metrics.three_way(h, m, threshold), [threshold]


TIE_RULES: Mapping[str, Callable[..., tuple[Array, Sequence[float]]]] = {
    "realisable": _realisable,
    "held-out": metrics.held_out_ties,
    "official": lambda h, m, prompts: (metrics.official_ties(h, m), []),
}


def headline(answers: Mapping[str, Answers]) -> float:
    """What rewards are ranked by: the first measure of Overall, or its mean over the dimensions."""
    first = {dim: next(iter(answer.measures.values())).value for dim, answer in answers.items()}
    if OVERALL in first:
        return first[OVERALL]
    known = [value for value in first.values() if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def behind(best: Mapping[str, Answers], other: Mapping[str, Answers], prompts: Sequence[str]) -> tuple[float, ...]:
    """(difference, low, high): the headline of one reward minus that of another, pair by pair, with its interval."""
    dims = [OVERALL] if OVERALL in best else list(best)
    parts = [(next(iter(best[d].measures.values())), next(iter(other[d].measures.values()))) for d in dims]
    change = np.concatenate([theirs.correct - ours.correct for ours, theirs in parts])
    weights = np.concatenate([_shares(ours) for ours, _ in parts])
    value = metrics.mean(change, weights)
    return value, *metrics.interval_of_change(change, list(prompts) * len(dims), weights)


def _shares(measured: Measured) -> Array:
    """Weights that add up to 1 over the pairs that count, so that each dimension counts the same."""
    weights = np.where(np.isnan(measured.correct), 0.0, measured.weights)
    return weights / max(weights.sum(), 1e-300)


def note_on(answers: Mapping[str, Answers]) -> str:
    """Which numbers of a reward were compared, in words."""
    own = [f"{dim} by {answer.source}" for dim, answer in answers.items() if answer.source not in (TOTAL, dim)]
    total = [dim for dim, answer in answers.items() if answer.source == TOTAL and dim != OVERALL]
    parts = [", ".join(own)] if own else []
    parts += [f"{', '.join(total)} by its total, since it has no such number"] if total else []
    return "; ".join(parts)


def labels_in_words(found: Benchmark) -> dict[str, dict[str, Any]]:
    """Dimension -> how many pairs have which label."""
    counted = {}
    for dim in found.dims:
        h = labels_of(found, dim)
        counts = {"first": h == 1, "second": h == -1, "tie": h == 0, "invalid": np.isnan(h)}
        counted[dim] = {name: int(which.sum()) for name, which in counts.items()}
    return counted
