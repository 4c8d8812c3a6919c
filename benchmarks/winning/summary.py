"""The numbers of a comparison, and what they say in words.

"Did it get better" is what all judges say; "would a stranger agree" is what those say that had no part in training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from alignment.gain_checks import IMAGE_MOVE, Finding
from alignment.gains import finite, number, percent

from .judges import INDEPENDENT, PEOPLE, RELATED, SELECTED, TRAINED, UNKNOWN
from .measures import DIVERSITY, DYNAMIC, FLOW, MEASURES, WORDS
from .models import BASE
from .rates import Change, Rate, change, outcomes, spread_of_seeds, win_rate
from .scoring import OVERALL, Answers
from .videos import Video

LESS_DIVERSE = 0.9  # of the base's diversity: a viewer notices that samples look alike
PICTURES = ("brightness", "saturation", "edge_density", "colour_entropy")


class Row(NamedTuple):
    """What one judge says in one dimension about a tuned model."""

    judge: str
    dim: str  # OVERALL for the total
    relation: str  # see judges.relation
    rate: Rate
    change: Change | None  # of scores; None for judges that compare
    seeds: tuple[float, float] | None  # spread between a prompt's samples, base's and tuned's
    by_sample: list[float]  # win rate of each sample number


class Comparison(NamedTuple):
    """A tuned model beside the base."""

    name: str
    rows: list[Row]
    measures: dict[str, Change]
    verdict: str
    findings: list[Finding]

    @property
    def totals(self) -> list[Row]:
        return [row for row in self.rows if row.dim == OVERALL]


def compare(
    name: str,
    answers: Answers,
    videos: Sequence[Video],
    compares: Mapping[str, bool],
    relations: Mapping[str, str],
    ties: Mapping[str, float],
    votes: Mapping[str, Sequence[tuple[int, float]]] = MappingProxyType({}),
    remarks: Sequence[Finding] = (),
) -> Comparison:
    """All numbers of a tuned model.

    Args:
        compares: judge -> whether it compares.
        relations: judge -> what it is to this model.
        ties: judge -> the difference up to which two scores are a tie; judges that compare have rates of a pair.
        votes: of people: dimension -> (place of the prompt, outcome 1, 0.5 or 0) of every answer.
        remarks: findings that are known already.
    """
    prompts, samples = [video.index for video in videos], np.array([video.sample for video in videos])
    rows = []
    for judge, pairwise in compares.items():
        against = name if pairwise else ""
        for dim in answers.columns(judge):
            base, tuned = (answers.column(judge, dim, model, against, videos) for model in (BASE, name))
            found = outcomes(base, tuned, ties.get(judge, 0.0))
            moved = None if pairwise else change(base, tuned, prompts)
            seeds = None if pairwise else (spread_of_seeds(base, prompts), spread_of_seeds(tuned, prompts))
            each = [win_rate(found[samples == s], np.array(prompts)[samples == s]).rate for s in np.unique(samples)]
            rows.append(Row(judge, dim, relations[judge], win_rate(found, prompts), moved, seeds, each))
    for dim, given in votes.items():
        places, found = zip(*given, strict=True)
        rows.append(Row(PEOPLE, dim, relations[PEOPLE], win_rate(found, places), None, None, []))
    measures = measured(name, answers, videos)
    totals = [row for row in rows if row.dim == OVERALL]
    findings = [*about_judges(totals), *about_measures(measures), *remarks]
    order = {"alarm": 0, "warning": 1, "note": 2, "good": 3}
    findings.sort(key=lambda finding: order[finding.level])
    return Comparison(name, rows, measures, verdict(name, totals), findings)


def measured(name: str, answers: Answers, videos: Sequence[Video]) -> dict[str, Change]:
    """What is measured without a judge, base and tuned. Diversity is of a prompt, so it counts once."""
    found = {}
    for column in WORDS:
        some = [video for video in videos if video.sample == 0] if column == DIVERSITY else videos
        base, tuned = (answers.column(MEASURES, column, model, "", some) for model in (BASE, name))
        found[column] = change(base, tuned, [video.index for video in some])
    return {column: moved for column, moved in found.items() if moved.pairs}


def shown(rows: Sequence[Row]) -> list[Row]:
    """Rows that a chart has something to say about: not the dimensions in which every pair ties."""
    return [row for row in rows if row.dim == OVERALL or row.rate.wins or row.rate.losses]


def better(rate: Rate) -> int:
    """1 where the tuned model surely wins more than half, -1 where it surely wins less, 0 where neither is sure."""
    return int(rate.low > 0.5) - int(rate.high < 0.5)


def verdict(name: str, totals: Sequence[Row]) -> str:
    """The lead: did it get better, and would a stranger agree?"""
    strangers = [row for row in totals if row.relation == INDEPENDENT and finite(row.rate.rate)]
    others = [row for row in totals if row.relation != INDEPENDENT and finite(row.rate.rate)]
    own = f" Besides: {_listed(others)}." if others else ""
    if not strangers:
        known = any(row.relation == UNKNOWN for row in totals)
        why = "what it was trained on is not known" if known else "no judge is independent of its training"
        return f"Whether a stranger would find {name} better cannot be said: {why}.{own}"
    signs = [better(row.rate) for row in strangers]
    if all(sign > 0 for sign in signs):
        start = f"{name} got better, and a stranger would agree"
    elif all(sign < 0 for sign in signs):
        start = f"{name} got worse, a stranger would say"
    elif any(sign > 0 for sign in signs) and any(sign < 0 for sign in signs):
        start = f"Strangers would not agree about {name}"
    elif any(sign > 0 for sign in signs):
        start = f"{name} got better for some strangers, and others see no difference"
    elif any(sign < 0 for sign in signs):
        start = f"{name} got worse for some strangers, and others see no difference"
    else:
        start = f"Nothing shows that a stranger would tell {name} from the base"
    return f"{start}: it wins {_listed(strangers)}.{own}"


def rate_words(rate: Rate) -> str:
    """`71.5% (64 to 78)`."""
    between = f" ({100 * rate.low:.0f} to {100 * rate.high:.0f})" if finite(rate.low) else ""
    return f"{percent(rate.rate)}{between}"


def _listed(rows: Sequence[Row]) -> str:
    words = {TRAINED: " (trained on)", SELECTED: " (selected its weights)", RELATED: " (related to its training)"}
    return ", ".join(f"{rate_words(row.rate)} by {row.judge}{words.get(row.relation, '')}" for row in rows)


def about_judges(totals: Sequence[Row]) -> list[Finding]:
    found = []
    trained = [row for row in totals if row.relation == TRAINED]
    strangers = [row for row in totals if row.relation == INDEPENDENT]
    risen = [row for row in trained if better(row.rate) > 0]
    fallen = [row for row in strangers if better(row.rate) < 0]
    for row in fallen:
        words = f"{row.judge}, which had no part in training, prefers the base: {rate_words(row.rate)}"
        if risen:
            text = f"It wins {_listed(risen)} yet {words}. Look at the pairs below before you believe the reward."
            found.append(Finding("alarm", "Reward hacking?", text))
        else:
            found.append(Finding("warning", "A stranger prefers the base", f"{words}."))
    if not strangers and any(row.relation == UNKNOWN for row in totals):
        text = "The tuned model is no run folder, so nothing says which of these judges it was trained on."
        found.append(Finding("warning", "No judge is known to be independent", text))
    elif not strangers:
        text = "Every judge here had a part in training: a win says that training worked, not that videos got better."
        found.append(Finding("alarm", "No judge is independent", f"{text} Add a --judge, or ask people: voting.html."))
    if trained and not risen:
        text = f"Even by what it was trained on the tuned model does not surely win: {_listed(trained)}"
        found.append(Finding("warning", "Training did not show", f"{text}."))
    for row in totals:
        if row.rate.masked:
            text = f"{row.rate.masked} of {row.rate.masked + _pairs(row.rate)} pairs had no answer and do not count."
            found.append(Finding("note", f"{row.judge} was not always able to judge", text))
    unsure = [row for row in strangers if not better(row.rate)]
    if unsure:
        text = f"Level within what so many prompts can tell: {_listed(unsure)}. More prompts would tell more."
        found.append(Finding("note", "No sure difference", text))
    if strangers and all(better(row.rate) > 0 for row in strangers):
        text = f"It wins {_listed(strangers)}; none of these had a part in training."
        found.append(Finding("good", "Strangers agree", text))
    return found


def _pairs(rate: Rate) -> int:
    return rate.wins + rate.ties + rate.losses


def about_measures(measures: Mapping[str, Change]) -> list[Finding]:
    found = []
    diversity = measures.get(DIVERSITY)
    if diversity and diversity.tuned < LESS_DIVERSE * diversity.base and diversity.high < 0:
        share = percent(diversity.tuned / diversity.base)
        text = f"The samples of a prompt lie {share} as far apart as the base's: it may have collapsed onto a style."
        found.append(Finding("warning", "Less diverse", text))
    dynamic, flow = measures.get(DYNAMIC), measures.get(FLOW)
    if dynamic and flow and (dynamic.high < 0 or (flow.high < 0 and flow.tuned < (1 - IMAGE_MOVE) * flow.base)):
        text = (
            f"Dynamic degree {percent(dynamic.base)} to {percent(dynamic.tuned)}, flow {number(flow.base)} to "
            f"{number(flow.tuned)} px. Judges of single frames like still videos: a usual way to cheat them."
        )
        found.append(Finding("warning", "Less motion", text))
    moves = [
        f"{WORDS[key]} {number(m.base)} to {number(m.tuned)}"
        for key in PICTURES
        if (m := measures.get(key)) and abs(m.change) > IMAGE_MOVE * abs(m.base) and not m.low <= 0 <= m.high
    ]
    if moves:
        what = ", ".join(moves)
        text = f"Changed by more than {IMAGE_MOVE:.0%}: {what}. If prompts do not ask for it, a shortcut was found."
        found.append(Finding("warning", "The pictures changed", text))
    return found


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything in it, nan as null."""
    judges: dict[str, Any] = {}
    for row in comparison.rows:
        dims = judges.setdefault(row.judge, {"relation": row.relation, "dims": {}})["dims"]
        dims[row.dim] = {
            **_plain(row.rate),
            "scores": _plain(row.change) if row.change else None,
            "spread_of_seeds": [number_or_none(v) for v in row.seeds] if row.seeds else None,
            "rate_by_sample": [number_or_none(v) for v in row.by_sample],
        }
    return {
        "verdict": comparison.verdict,
        "findings": [finding._asdict() for finding in comparison.findings],
        "judges": judges,
        "measures": {key: _plain(moved) for key, moved in comparison.measures.items()},
    }


def _plain(found: NamedTuple) -> dict[str, Any]:
    return {key: number_or_none(value) for key, value in found._asdict().items()}


def number_or_none(value: float) -> float | None:
    return value if finite(value) else None
