"""How often a reward agrees with people: pure functions of labels and margins, in float64.

P pairs. h (P,) labels: 1 the first is better, -1 the second is, 0 a tie, NaN invalid. m (P,) margins: the score of the
first minus that of the second; NaN where one of them could not be scored, which always counts as wrong. What a measure
returns is `correct` (P,): 1 right, 0 wrong, NaN where the pair does not count. Its value is `mean(correct, weights)`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.clusters import clustered, unanimous

Array = NDArray[np.float64]
VIDEO_SCORE_BAND = 0.5


def without_ties(h: ArrayLike, m: ArrayLike) -> Array:
    """Over pairs with a better one: right where the margin has its sign; equal scores are wrong."""
    h, m = _arrays(h, m)
    return np.where(_decided(h), h * m > 0, np.nan)


def official_without_ties(h: ArrayLike, m: ArrayLike) -> Array:
    """As `without_ties`, but invalid labels are wrong, as VideoAlign's count has it; see `official_ties`."""
    h, m = _arrays(h, m)
    return np.where(h == 0, np.nan, h * m > 0)


def tie_aware(h: ArrayLike, m: ArrayLike) -> Array:
    """As `without_ties`, but equal scores count half: what tossing a coin would give."""
    h, m = _arrays(h, m)
    return np.where(_decided(h) & (m == 0), 0.5, without_ties(h, m))


def three_way(h: ArrayLike, m: ArrayLike, threshold: float) -> Array:
    """Better, worse or a tie, where |m| <= threshold says that it is a tie."""
    h, m = _arrays(h, m)
    tie = np.abs(m) <= threshold
    return np.where(np.isnan(h), np.nan, np.where(tie, h == 0, h * m > 0))


def best_threshold(h: ArrayLike, m: ArrayLike) -> float:
    """The threshold with the best `three_way` accuracy, the smallest of equals.

    Tried are 0, which calls only equal scores ties, and every |m|. Pairs with the same |m| are ties together, so that
    it is a threshold that can be had, whatever the order of the rows.

    Source: Deutsch et al., Ties Matter (arXiv 2305.14324), algorithm 1.
    """
    h, m = _arrays(h, m)
    known = ~np.isnan(h) & ~np.isnan(m)
    h, m = h[known], m[known]
    order = np.argsort(np.abs(m), kind="stable")
    sizes = np.abs(m)[order]
    gained = np.cumsum((h == 0).astype(float)[order] - (h * m > 0)[order])
    last = np.append(sizes[1:] != sizes[:-1], True)[: len(sizes)]  # of those with the same |m|
    thresholds, gains = np.append(0.0, sizes[last]), np.append(0.0, gained[last])
    return float(thresholds[np.argmax(gains)])


def official_ties(h: ArrayLike, m: ArrayLike) -> Array:
    """Accuracy with ties as VideoAlign counts it, with what that does to equal margins.

    Pairs become ties one by one, by |m| and then by row, and the best accuracy after one of these steps counts. So
    pairs with the same |m| may fall on both sides of the threshold, the value depends on the order of the rows, and
    calling nothing a tie is never tried. Invalid labels are wrong. A NaN margin is never a tie, and what it does to the
    order of the others is what it does to Python's sort; a margin below the one before it is not made a tie.

    Source: https://github.com/KwaiVGI/VideoAlign, calc_accuracy.py.
    """
    h, m = _arrays(h, m)
    size = np.abs(m)
    correct = (h * m > 0).astype(np.float64)
    hits, before, best, tied, best_tied = int(correct.sum()), -1.0, -1, [], 0
    for i in sorted(range(len(m)), key=size.tolist().__getitem__):
        if size[i] >= before or math.isnan(before) and not math.isnan(size[i]):
            hits += int(h[i] == 0) - int(correct[i])
            tied.append(i)
        before = size[i]
        if hits > best:
            best, best_tied = hits, len(tied)
    correct[tied[:best_tied]] = h[tied[:best_tied]] == 0
    return correct


def held_out_ties(h: ArrayLike, m: ArrayLike, prompts: Sequence[str]) -> tuple[Array, tuple[float, float]]:
    """`three_way` of each half of the prompts with the best threshold of the other half, and the two thresholds.

    Prompts are dealt out by their hashes, so that none is in both halves; NaN throughout where there is one only.
    """
    h, m = _arrays(h, m)
    ordered = sorted(set(prompts), key=lambda prompt: hashlib.sha256(prompt.encode()).digest())
    if len(ordered) < 2:
        return np.full(len(h), np.nan), (math.nan, math.nan)
    second = np.isin(np.asarray(prompts, dtype=object), ordered[1::2])
    thresholds = tuple(best_threshold(h[half], m[half]) for half in (second, ~second))
    return np.where(second, three_way(h, m, thresholds[1]), three_way(h, m, thresholds[0])), thresholds


def video_score_rule(h: ArrayLike, m: ArrayLike, band: float = VIDEO_SCORE_BAND) -> Array:
    """A pair labelled a tie is right where |m| < band; others compare strictly, so no tie is ever said of them.

    Source: https://github.com/TIGER-AI-Lab/VideoScore, benchmark/get_genaibench_pairwise_acc.py; its band is for scores
    from 1 to 4.
    """
    h, m = _arrays(h, m)
    return np.where(np.isnan(h), np.nan, np.where(h == 0, np.abs(m) < band, h * m > 0))


def ranked(h: ArrayLike, m: ArrayLike) -> Array:
    """1 minus inversions: ties of the labels are right whatever the margin is, equal scores of others are wrong.

    The authors break equal scores by the sort, so that a reward that says the same of everything has any value.

    Source: https://github.com/tgxs002/HPSv2, src/training/train.py, inversion_score.
    """
    h, m = _arrays(h, m)
    return np.where(np.isnan(h), np.nan, ((h == 0) & ~np.isnan(m)) | (h * m > 0))


def per_record(correct: Array, records: Sequence[str]) -> Array:
    """(P,) weights with which the mean over pairs is the mean over records, each the mean of its pairs that count."""
    _, place = np.unique(np.asarray(records, dtype=object).astype(str), return_inverse=True)
    counts = np.bincount(place, ~np.isnan(correct), minlength=1)[place]
    return np.divide(1.0, counts, out=np.zeros(len(correct)), where=counts > 0)


def mean(correct: Array, weights: Array | None = None) -> float:
    """Over the pairs that count; NaN where none does."""
    counts = ~np.isnan(correct)
    weights = np.ones(len(correct)) if weights is None else weights
    total = float(weights[counts].sum())
    return float((weights * np.nan_to_num(correct))[counts].sum() / total) if total else math.nan


def interval(correct: Array, prompts: Sequence[str], weights: Array | None = None) -> tuple[float, float]:
    """95 % bootstrap interval of `mean`; prompts are resampled, since pairs of one are not independent.

    Thresholds stay what they are. Where all pairs are right, or none is, it is the exact binomial one of as many
    prompts. NaN of fewer than two prompts.
    """
    counts = ~np.isnan(correct)
    num = len({prompt for prompt, counted in zip(prompts, counts, strict=True) if counted})
    if num > 1 and np.unique(correct[counts]).tolist() in ([0.0], [1.0]):
        margin = unanimous(num)
        return (margin, 1.0) if correct[counts][0] else (0.0, 1 - margin)
    return interval_of_change(correct, prompts, weights)


def interval_of_change(change: Array, prompts: Sequence[str], weights: Array | None = None) -> tuple[float, float]:
    """As `interval`, of the difference of two rewards' `correct`, by resampling alone."""
    counts = ~np.isnan(change)
    weights = None if weights is None else weights[counts]
    return clustered(change[counts], np.asarray(prompts, dtype=object)[counts], weights)[1:]


def chance_with_ties(h: ArrayLike) -> float:
    """What margins that know nothing of the labels reach at their best threshold: all ties, or none."""
    h, _ = _arrays(h, h)
    ties = mean(np.where(np.isnan(h), np.nan, h == 0))
    return max(ties, (1 - ties) / 2)


def chance_ranked(h: ArrayLike, weights: Array) -> float:
    """Ties of the labels, and half of the other pairs."""
    h, _ = _arrays(h, h)
    return mean(np.where(np.isnan(h), np.nan, np.where(h == 0, 1.0, 0.5)), weights)


def threshold_curve(h: ArrayLike, m: ArrayLike) -> list[tuple[float, float]]:
    """(pairs called a tie, `three_way` accuracy), in percent, for each threshold that `best_threshold` tries."""
    h, m = _arrays(h, m)
    valid = ~np.isnan(h)
    h, m = h[valid], m[valid]
    sizes = np.unique(np.append(np.abs(m)[~np.isnan(m)], 0.0))
    steps = sizes[:: max(1, len(sizes) // 200)]
    tied = [(float(np.mean(np.abs(m) <= size)), three_way(h, m, size)) for size in steps]
    return [(100 * share, 100 * mean(correct)) for share, correct in tied]


def _decided(h: Array) -> NDArray[np.bool_]:
    return (h == 1) | (h == -1)


def _arrays(h: ArrayLike, m: ArrayLike) -> tuple[Array, Array]:
    return np.asarray(h, dtype=np.float64), np.asarray(m, dtype=np.float64)
