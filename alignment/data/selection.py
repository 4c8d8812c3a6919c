"""From scored groups to pairs, and from pairs to those that there is something to learn from.

Nothing here changes a record that it is given. A pair made from a group has the better video as a, label 1, and no
annotator, since the caller chose what decides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import permutations
from statistics import pstdev

from ..errors import UserError
from .preferences import Group, Pair, Score, combined_each, deciding, score_of

RARITY = 0.72  # the share of pairs that has weight 1


def best_worst(group: Group, score: Score = None, tie_eps: float = 0.0) -> list[Pair]:
    """The best video of a group with the worst one; of equals the first.

    Args:
        score: what decides, see `preferences.combined`. Videos that lack a score, or a finite one, do not take part.
        tie_eps: >= 0; the gap has to be larger.
    Returns: one pair; none where all are as good, or fewer than two take part.
    """
    values = _finite(group, score)
    if not values:
        return []
    best, worst = max(values, key=values.__getitem__), min(values, key=values.__getitem__)
    return [pair_of(group, best, worst)] if values[best] - values[worst] > _checked(tie_eps) else []


def all_pairs(group: Group, score: Score = None, tie_eps: float = 0.0) -> list[Pair]:
    """Every two videos of a group that are not as good as each other; arguments as in `best_worst`."""
    values = _finite(group, score)
    ordered = permutations(values, 2)
    return [pair_of(group, i, j) for i, j in ordered if values[i] - values[j] > _checked(tie_eps)]


def pareto_pairs(
    group: Group, dims: Sequence[str], main: str, tolerance: float, emphasis: str | None = None
) -> list[Pair]:
    """MagicID's hybrid selection: pairs that differ in one dimension alone, then pairs that differ in all of them.

    Stage 1: the two videos with the largest gap in `main`, of those that differ by less than `tolerance` in all other
    dimensions. Stage 2: each video of the Pareto front against the one, of those that it dominates, with the largest
    gap in `emphasis`; that gap has to be above 0, so that a still video does not win where motion is meant. A pair that
    both stages find comes once.

    Args:
        dims: all that count; videos that lack a score in one do not take part.
        main: of them, as MagicID's likeness of a face.
        emphasis: of them, as MagicID's amount of motion; None: main.
    Source: MagicID (arXiv 2503.12689). How many pairs a stage gives is not public; that it is one in stage 1 and one
        for each winner in stage 2 is decided here.
    """
    emphasis = emphasis or main
    if not {main, emphasis} <= set(dims):
        raise ValueError(f"main ({main}) and emphasis ({emphasis}) have to be among dims ({', '.join(dims)})")
    columns = [_finite(group, name) for name in dims]
    shared = sorted(set.intersection(*(set(column) for column in columns)))
    rows = {i: dict(zip(dims, (column[i] for column in columns), strict=True)) for i in shared}

    def gap(i: int, j: int, name: str) -> float:
        return rows[i][name] - rows[j][name]

    others = [name for name in dims if name != main]
    alike = [
        (gap(i, j, main), i, j)
        for i, j in permutations(rows, 2)
        if gap(i, j, main) > 0 and all(abs(gap(i, j, name)) < tolerance for name in others)
    ]
    chosen = [max(alike, key=lambda found: found[0])[1:]] if alike else []
    for i in (shared[place] for place in pareto_front([list(row.values()) for row in rows.values()])):
        beaten = [j for j in rows if gap(i, j, emphasis) > 0 and all(gap(i, j, name) >= 0 for name in dims)]
        if beaten:
            chosen.append((i, max(beaten, key=lambda j, i=i: gap(i, j, emphasis))))
    return [pair_of(group, i, j) for i, j in dict.fromkeys(chosen)]


def pareto_front(rows: Sequence[Sequence[float]]) -> list[int]:
    """Places of the rows that none dominates: is as good in every column and better in one."""

    def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))

    return [i for i, row in enumerate(rows) if not any(dominates(other, row) for other in rows)]


def pair_of(group: Group, better: int, worse: int) -> Pair:
    """Two members of a group as a pair, with the scores that both have."""
    scores = {name: (values[better], values[worse]) for name, values in group.scores.items()}
    return Pair(
        id=f"{group.id}:{better}>{worse}",
        prompt=group.prompt,
        a=group.members[better],
        b=group.members[worse],
        label=1,
        scores={name: both for name, both in scores.items() if None not in both},
        labels={},
        source=group.source,
        line=group.line,
    )


def decided(
    records: Iterable[Pair | Group],
    dimension: str | None = None,
    tie_eps: float = 0.0,
    key: str = "data.preferences",
) -> list[Pair]:
    """The pairs that there is something to learn from, each with the better video as a.

    A pair's label (of the dimension, where one is named) decides; where it has none, its scores do. A tie is left out:
    label 0, or scores that are no further apart than tie_eps (beside a label, only where that is above 0). A group
    gives its best and its worst video.

    Raises: UserError where nothing is left, which says why.
    """
    found: list[Pair] = []
    ties = unlabelled = 0
    for record in records:
        if isinstance(record, Group):
            pairs, label = best_worst(record, dimension, tie_eps), 0 if len(_finite(record, dimension)) > 1 else None
        else:
            label = _label(record, dimension, tie_eps)
            pairs = [record if label == 1 else exchanged(record)] if label else []
        found += [pair._replace(label=1) for pair in pairs]
        ties += not pairs and label == 0
        unlabelled += label is None
    if not found:
        of = f" by {dimension}" if dimension else ""
        raise UserError(
            f"{key}: no pair to learn from: {ties} tied and {unlabelled} unlabelled{of}; annotate them, name another "
            "dimension, or lower tie_eps"
        )
    return found


def exchanged(pair: Pair) -> Pair:
    """The same pair with a and b in each other's place."""
    labels = pair.segment_labels
    return pair._replace(
        a=pair.b,
        b=pair.a,
        label=None if pair.label is None else -pair.label,
        scores={name: (b, a) for name, (a, b) in pair.scores.items()},
        labels={name: -label for name, label in pair.labels.items()},
        segment_labels=None if labels is None else tuple(-label for label in labels),
    )


def label_from_scores(
    scores: Mapping[str, tuple[float, float]], score: Score = None, tie_eps: float = 0.0
) -> int | None:
    """1 where the first of two videos is better by more than tie_eps, -1 where the second is, else 0.

    None where a score that this takes lacks.
    """
    values = combined_each(scores, score)
    if not values or not all(map(math.isfinite, values)):
        return None
    return _beyond(values[0] - values[1], tie_eps)


def btt_label(difference: float, theta: float = 5.0) -> int:
    """The likeliest of better (1), worse (-1) and tie (0) in the Bradley-Terry model with ties.

    P(better) = 1 / (1 + theta e^-d), P(tie) = (theta^2 - 1) P(better) P(worse). So it is a tie within
    |d| < ln((theta^2 - 2) / theta), 1.526 at theta 5.

    Args:
        difference: d of the raw rewards of one dimension.
        theta: > 1; VideoReward's is 5.
    Source: VideoReward (arXiv 2501.13918) is trained with it; Rao and Kupper (1967).
    """
    if not math.isfinite(difference):
        raise ValueError(f"a difference of rewards is {difference}")
    tie = (theta**2 - 2) / theta * math.exp(-abs(difference)) > 1
    return 0 if tie else _sign(difference)


def rarity_weights(pairs: Sequence[Pair], exponent: float, score: Score = None, bins: int = 10) -> list[float]:
    """VideoDPO's weights, (0.72 / p)^exponent: pairs with an unusual gap count more.

    p is the share of the pairs whose gap |score of a - score of b| lies in the same one of `bins` equal intervals
    between the smallest and the largest gap.

    Args:
        exponent: 0 gives every pair weight 1 and needs no scores.
    Raises: UserError for a pair without scores.
    Source: VideoDPO (arXiv 2412.14167), whose code has this form and a default exponent of 0; that rarity is taken of
        the gap, by equal intervals, is decided here.
    """
    if exponent == 0:
        return [1.0] * len(pairs)
    gaps = [abs(a - b) for a, b in _scores(pairs, score)]
    low, width = min(gaps), (max(gaps) - min(gaps)) / bins
    places = [min(int((gap - low) / width), bins - 1) if width else 0 for gap in gaps]
    counts = Counter(places)
    return [(RARITY * len(pairs) / counts[place]) ** exponent for place in places]


def standard_gaps(pairs: Sequence[Pair], score: Score = None) -> list[float]:
    """Score of a minus score of b, in standard deviations of all scores.

    Raises: UserError for a pair without scores.
    """
    scores = _scores(pairs, score)
    spread = pstdev([value for both in scores for value in both]) or 1.0
    return [(a - b) / spread for a, b in scores]


def _scores(pairs: Sequence[Pair], score: Score) -> list[tuple[float, float]]:
    found = []
    for pair in pairs:
        both = score_of(pair, score)
        if both is None:
            of = f" by {score}" if isinstance(score, str) else ""
            raise UserError(f"line {pair.line}: the pair {pair.id} has no scores{of}; annotate it with a reward")
        found.append(both)
    return found


def _label(pair: Pair, dimension: str | None, tie_eps: float) -> int | None:
    given = pair.label if dimension is None else pair.labels.get(dimension)
    scored = label_from_scores(pair.scores, dimension or deciding(pair), tie_eps)
    return scored if given is None or (tie_eps > 0 and scored == 0) else given


def _finite(group: Group, score: Score) -> dict[int, float]:
    """The number of each member that has one."""
    return {i: value for i, value in enumerate(combined_each(group.scores, score)) if math.isfinite(value)}


def _beyond(gap: float, tie_eps: float) -> int:
    return 0 if abs(gap) <= _checked(tie_eps) else _sign(gap)


def _checked(tie_eps: float) -> float:
    if not tie_eps >= 0:
        raise ValueError(f"tie_eps is {tie_eps}; it is 0 or more")
    return tie_eps


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
