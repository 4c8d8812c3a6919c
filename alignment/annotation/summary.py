"""What labels are like, in numbers and in words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any, NamedTuple

from ..data import Pair, score_of
from .labels import Rule


class Labelled(NamedTuple):
    """A pair as it is written, and as it was asked about."""

    pair: Pair
    asked: Pair
    given: int | None  # the label that it came with


def summarise(labelled: Sequence[Labelled], rule: Rule, failed: int, probes: dict[str, Any]) -> dict[str, Any]:
    """Of all pairs; a number of which there is nothing to make is None."""
    pairs = [found.pair for found in labelled]
    ties = sum(pair.label == 0 for pair in pairs)
    gaps = [abs(a - b) for a, b in map(score_of, pairs)]
    orders = [pair.order_consistent for pair in pairs if pair.order_consistent is not None]
    votes = [vote for pair in pairs for vote in pair.segment_labels or ()]
    agreement = {
        f"{first}, {second}": _alike((pair.labels[first], pair.labels[second]) for pair in pairs)
        for first, second in combinations(rule.names, 2)
    }
    return {
        "annotator": pairs[0].annotator if pairs else rule.decider,
        "pairs": len(pairs),
        "ties": ties,
        "tie_share": ties / len(pairs) if pairs else None,
        "tied_segments_share": votes.count(0) / len(votes) if votes else None,
        "mean_gap": fmean(gaps) if gaps else None,
        "order_consistency": fmean(orders) if orders else None,
        "agreement": agreement,
        "agreement_with_given_labels": _alike((f.pair.label, f.given) for f in labelled if f.given is not None),
        "left_out": failed,
        "probes": probes,
    }


def in_words(summary: dict[str, Any]) -> list[str]:
    """Lines for the terminal."""
    if not summary["pairs"]:
        return [f"{summary['annotator']}: no pair; everything is tied, or nothing could be judged"]
    lines = [
        f"{summary['annotator']}: {summary['pairs']} pairs, {summary['ties']} of them ties "
        f"({summary['tie_share']:.3f}), mean gap {summary['mean_gap']:.4f}"
    ]
    if summary["tied_segments_share"] is not None:
        lines.append(f"share of segments that are ties: {summary['tied_segments_share']:.3f}")
    if summary["order_consistency"] is not None:
        lines.append(f"share of pairs with one winner in both orders: {summary['order_consistency']:.3f}")
    alike = summary["agreement"] | {"labels given before": summary["agreement_with_given_labels"]}
    lines += [f"agreement, {n}: {a['share']:.3f} of {a['pairs']} pairs" for n, a in alike.items() if a["pairs"]]
    if summary["left_out"]:
        lines.append(f"left out, since a reward gave no number: {summary['left_out']} groups or pairs")
    still, swap = (summary["probes"].get(name) for name in ("static_duplicate", "label_swap"))
    if still:
        lines.append(
            f"static duplicate: the video frozen at its first frame wins or ties in {still['share']:.3f} of "
            f"{still['videos']} cases" + _doubt(still["share"] >= 0.5, "these labels teach videos to stand still")
        )
        lines += [
            f"  by {name}: {share:.3f}" for name, share in still["by_score"].items() if len(still["by_score"]) > 1
        ]
    if swap:
        lines.append(
            f"label swap: labels negate for {swap['share']:.3f} of {swap['pairs']} pairs"
            + _doubt(swap["share"] < 1, "scores depend on chance, or on what else is in a call")
        )
    return lines


def _doubt(holds: bool, what: str) -> str:
    return f"; careful: {what}" if holds else ""


def _alike(labels: Iterable[tuple[int, int]]) -> dict[str, Any]:
    """Share of the pairs of labels that are the same, ties left out."""
    decided = [first == second for first, second in labels if first and second]
    return {"share": fmean(decided) if decided else None, "pairs": len(decided)}
