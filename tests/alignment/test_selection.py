"""Which pairs are made, which are kept and what they weigh, against hand arithmetic and the faults of other code."""

import copy
import itertools
import math
import random
from pathlib import Path

import pytest

from alignment.data import (
    Group,
    Member,
    Pair,
    Prompt,
    all_pairs,
    best_worst,
    btt_label,
    combined,
    decided,
    exchanged,
    label_from_scores,
    pareto_front,
    pareto_pairs,
    parse_record,
    rarity_weights,
    score_of,
    standard_gaps,
    to_json,
)
from alignment.errors import UserError

NAN = math.nan


def group(line=4, **scores):
    count = len(next(iter(scores.values())))
    members = tuple(Member(Path(f"{i}.mp4"), None, seed=i) for i in range(count))
    return Group("g", Prompt("a kite", {"count": 1}), members, scores, "wan", line)


def pair(label=None, labels=None, annotator=None, line=1, **scores):
    members = Member(Path("a.mp4"), None), Member(Path("b.mp4"), None)
    return Pair("p", Prompt("a kite", {}), *members, label, scores, labels or {}, annotator=annotator, line=line)


def places(pairs):
    """(better, worse) by place in the group, from the members themselves."""
    return [(made.a.seed, made.b.seed) for made in pairs]


def test_the_best_with_the_worst():
    (made,) = best_worst(group(VQ=(0.5, 3.0, -1.0, 2.0), MQ=(1.0, None, 2.0, 4.0)), "VQ")
    assert places([made]) == [(1, 2)]
    assert (made.label, made.scores, made.labels, made.annotator) == (1, {"VQ": (3.0, -1.0)}, {}, None)
    assert (made.id, made.prompt, made.source, made.line) == ("g:1>2", Prompt("a kite", {"count": 1}), "wan", 4)


def test_scores_are_numbers_even_where_they_came_as_text():
    # As text, "9" is above "10" and "-10" below "-9": the wrong one would win.
    assert places(best_worst(group(VQ=("9", "10", "8")), "VQ")) == [(1, 2)]
    assert places(best_worst(group(VQ=("10", "9")))) == [(0, 1)]
    assert places(all_pairs(group(VQ=("9", "10", "100")), "VQ")) == [(1, 0), (2, 0), (2, 1)]
    assert label_from_scores({"VQ": ("10", "9")}) == 1


@pytest.mark.parametrize(
    "values", [(2.0, 2.0, 2.0), (0.1 + 0.2, 0.3, 0.3), (1.0,), (1.0, None), (NAN, 1.0), (NAN, None)]
)
@pytest.mark.parametrize("select", [best_worst, all_pairs])
def test_a_group_without_a_gap_makes_no_pair(select, values):
    """Not one of a video with itself, nor the first with the second."""
    assert select(group(VQ=values), "VQ", tie_eps=1e-9) == []


@pytest.mark.parametrize("select", [best_worst, all_pairs])
def test_a_gap_has_to_be_above_the_tie(select):
    assert select(group(VQ=(1.0, 1.5)), "VQ", tie_eps=0.5) == []
    assert places(select(group(VQ=(1.0, 1.5)), "VQ", tie_eps=0.499)) == [(1, 0)]
    assert select(group(VQ=(2.0, 2.0, 2.0))) == []
    with pytest.raises(ValueError, match="tie_eps is -1"):
        select(group(VQ=(2.0, 2.0)), tie_eps=-1)


def test_videos_without_a_finite_score_do_not_take_part():
    scored = group(VQ=(NAN, 1.0, math.inf, -math.inf, 0.0, None))
    assert places(best_worst(scored, "VQ")) == [(1, 4)]
    assert places(all_pairs(scored, "VQ")) == [(1, 4)]


def test_every_pair_of_a_group():
    values = (1.0, 3.0, 1.0, -2.0)
    made = places(all_pairs(group(VQ=values), "VQ"))
    assert made == [(i, j) for i, j in itertools.product(range(4), repeat=2) if values[i] > values[j]]
    assert len(made) == 5  # of 6, one is a tie


def test_what_decides():
    scored = group(VQ=(4.0, 0.0, 1.0), MQ=(0.0, 3.0, 3.5))
    assert places(best_worst(scored, "MQ")) == [(2, 0)]
    assert places(best_worst(scored)) == [(2, 1)]  # means 2, 1.5, 2.25
    assert places(best_worst(scored, {"VQ": 1.0, "MQ": 0.1})) == [(0, 1)]
    assert places(best_worst(scored, {"MQ": -1.0})) == [(0, 2)]
    assert best_worst(scored, "TA") == []


def test_combined():
    assert combined({"VQ": 1.0, "MQ": 2.0, "TA": 6.0}) == 3.0
    assert combined({"VQ": 1.0, "MQ": 2.0, "TA": 6.0}, "MQ") == 2.0
    assert combined({"VQ": 1.0, "MQ": 2.0}, {"MQ": 0.5, "VQ": -3.0}) == -2.0
    assert all(map(math.isnan, [combined({}), combined({"VQ": None, "MQ": 1.0}), combined({"VQ": 1.0}, {"MQ": 1.0})]))
    assert score_of(pair(VQ=(1.0, 2.0), MQ=(3.0, 6.0))) == (2.0, 4.0)
    assert score_of(pair(VQ=(1.0, 2.0)), "MQ") is None
    assert score_of(pair()) is None


def test_labels_from_scores():
    scores = {"VQ": (1.0, 0.0), "MQ": (0.0, 1.5)}  # means .5 and .75
    assert label_from_scores(scores) == -1
    assert label_from_scores(scores, tie_eps=0.25) == 0
    assert label_from_scores(scores, tie_eps=0.24) == -1
    assert label_from_scores(scores, "VQ") == 1
    assert label_from_scores(scores, {"VQ": 0.75, "MQ": 0.5}) == 0
    assert label_from_scores(scores, "TA") is None
    assert label_from_scores({}) is None


@pytest.mark.parametrize("theta", [1.2, 2.0, 3.0, 5.0, 20.0])
def test_the_likeliest_outcome_with_ties(theta):
    """The three probabilities, computed one by one."""
    for d in [0.0, *(random.Random(0).uniform(-6, 6) for _ in range(300))]:
        better, worse = 1 / (1 + theta * math.exp(-d)), 1 / (1 + theta * math.exp(d))
        tie = (theta**2 - 1) * better * worse
        assert better + worse + tie == pytest.approx(1)
        likeliest = max((tie, 0), (better, 1), (worse, -1))[1] if d else 0
        assert btt_label(d, theta) == likeliest


def test_the_band_of_ties_of_video_reward():
    band = math.log(23 / 5)
    assert band == pytest.approx(1.526, abs=5e-4)
    assert [btt_label(s * band * f) for s in (1, -1) for f in (0.999, 1.001)] == [0, 1, 0, -1]
    assert btt_label(1e6) == 1
    assert btt_label(-1e6) == -1
    with pytest.raises(ValueError, match="nan"):
        btt_label(NAN)


def test_pareto_front():
    #            best in 1, 0   beaten by 0   a copy       beaten by 4   middle
    rows = [(3.0, 1.0), (2.0, 1.0), (3.0, 1.0), (0.0, 2.0), (1.0, 2.0)]
    assert pareto_front(rows) == [0, 2, 4]
    assert pareto_front([(1.0,), (5.0,), (5.0,), (-2.0,)]) == [1, 2]  # of a single score the largest
    assert pareto_front([]) == []


def test_pareto_pairs_in_two_stages():
    scored = group(
        ID=(0.9, 0.2, 0.8, 0.1, 0.5),
        motion=(0.1, 0.15, 0.9, 0.2, 0.0),
        text=(0.5, 0.5, 0.6, 0.5, 0.5),
    )
    # Stage 1 at 0.12: 0 and 3 have gap 0.8 in ID and 0.1 in motion; 0 and 1 follow with 0.7.
    # Stage 2: 2 dominates 1, 3 and 4, of which 4 moves least. 0 dominates 4, of which it moves more.
    made = pareto_pairs(scored, ["ID", "motion", "text"], "ID", tolerance=0.12, emphasis="motion")
    assert places(made) == [(0, 3), (0, 4), (2, 4)]
    # With emphasis on ID: 2 takes the one with the least of it, and 0 has dominated 4 alone.
    made = pareto_pairs(scored, ["ID", "motion", "text"], "ID", tolerance=0.12)
    assert places(made) == [(0, 3), (0, 4), (2, 3)]
    # At 0.07: 0 and 1, by 0.05 in motion. At 0.04 no two are alike.
    made = pareto_pairs(scored, ["ID", "motion", "text"], "ID", tolerance=0.07, emphasis="motion")
    assert places(made) == [(0, 1), (0, 4), (2, 4)]
    made = pareto_pairs(scored, ["ID", "motion", "text"], "ID", tolerance=0.04, emphasis="motion")
    assert places(made) == [(0, 4), (2, 4)]


def test_winners_of_the_second_stage():
    """Over random groups: not dominated, above what they are paired with in all, and never still."""
    draw = random.Random(1)
    dims = ["ID", "motion", "text"]
    for _ in range(50):
        table = {name: tuple(draw.choice([0.0, 0.25, 0.5, 1.0]) for _ in range(7)) for name in dims}
        rows = list(zip(*table.values(), strict=True))
        for i, j in places(pareto_pairs(group(**table), dims, "ID", tolerance=0.0, emphasis="motion")):
            assert all(x >= y for x, y in zip(rows[i], rows[j], strict=True))
            assert rows[i][1] > rows[j][1] >= 0.0
            assert not any(
                rows[k] != rows[i] and all(x >= y for x, y in zip(rows[k], rows[i], strict=True)) for k in range(7)
            )


def test_pareto_pairs_of_one_score_are_the_best_with_the_worst():
    scored = group(VQ=(1.0, 3.0, None, -2.0))
    assert pareto_pairs(scored, ["VQ"], "VQ", tolerance=0.1) == best_worst(scored, "VQ")
    assert pareto_pairs(group(VQ=(2.0, 2.0)), ["VQ"], "VQ", tolerance=0.1) == []
    assert pareto_pairs(group(VQ=(2.0, 1.0)), ["VQ", "MQ"], "VQ", tolerance=0.1) == []
    with pytest.raises(ValueError, match="have to be among dims"):
        pareto_pairs(scored, ["VQ"], "ID", tolerance=0.1)


def test_rarity():
    # Gaps 0, 0.1, 0.2 of 1 lie in the lowest two of ten intervals, 0.95 and 1 in the highest, whichever way they point.
    pairs = [pair(VQ=(gap, 0.0)) for gap in (0.0, 0.05, -0.15, 0.95)] + [pair(VQ=(0.0, 1.0))]
    shares = [2 / 5, 2 / 5, 1 / 5, 2 / 5, 2 / 5]
    assert rarity_weights(pairs, 1.0) == pytest.approx([0.72 / p for p in shares])
    assert rarity_weights(pairs, 0.5) == pytest.approx([(0.72 / p) ** 0.5 for p in shares])
    assert rarity_weights(pairs, 0) == [1.0] * 5
    assert rarity_weights(pairs, 1.0, bins=1) == pytest.approx([0.72] * 5)
    assert rarity_weights([pair(VQ=(1.0, 0.0))] * 3, 1.0) == pytest.approx([0.72] * 3)  # one gap: all alike
    assert rarity_weights([pair()], 0) == [1.0]
    with pytest.raises(UserError, match="line 7: the pair p has no scores"):
        rarity_weights([*pairs, pair(label=1, line=7)], 1.0)


def test_standard_gaps():
    pairs = [pair(VQ=(3.0, -1.0)), pair(VQ=(1.0, 1.0))]  # of all four: mean 1, variance (4 + 4 + 0 + 0) / 4
    assert standard_gaps(pairs) == pytest.approx([4 / math.sqrt(2), 0.0])
    assert standard_gaps([pair(VQ=(1.0, 1.0))], "VQ") == [0.0]
    with pytest.raises(UserError, match="line 1: the pair p has no scores by MQ"):
        standard_gaps(pairs, "MQ")


def test_decided_pairs_have_the_better_one_first():
    lower = pair(-1, {"VQ": 1, "MQ": 0}, VQ=(1.0, 2.0))._replace(segment_labels=(1, 0, -1))
    (made,) = decided([lower])
    assert (made.a, made.b, made.label) == (lower.b, lower.a, 1)
    assert (made.scores, made.labels, made.segment_labels) == ({"VQ": (2.0, 1.0)}, {"VQ": -1, "MQ": 0}, (-1, 0, 1))
    higher = pair(1, VQ=(1.0, 2.0))
    assert decided([higher]) == [higher]
    assert exchanged(exchanged(lower)) == lower


def test_what_decides_a_pair():
    by_label = pair(1, {"VQ": -1, "MQ": 0}, VQ=(1.0, 2.0), TA=(5.0, 1.0))
    assert decided([by_label])[0].a == by_label.a
    assert decided([by_label], "VQ")[0].a == by_label.b
    assert decided([by_label], "TA")[0].a == by_label.a  # no label of TA: its scores
    assert decided([pair(VQ=(1.0, 2.0), TA=(5.0, 1.0))])[0].scores["VQ"] == (1.0, 2.0)  # no label: the mean of all
    with pytest.raises(UserError, match="1 tied and 0 unlabelled by MQ"):
        decided([by_label], "MQ")


def test_the_annotators_own_score_decides():
    ours = pair(None, annotator="VQ", VQ=(2.0, 1.0), MQ=(0.0, 5.0))
    assert score_of(ours) == (2.0, 1.0)
    assert score_of(ours, "MQ") == (0.0, 5.0)
    assert decided([ours])[0].a == ours.a
    assert decided([ours], "MQ")[0].a == ours.b
    with pytest.raises(UserError, match="1 tied"):
        decided([ours._replace(label=1)], tie_eps=1.0)


def test_ties_are_left_out_in_order():
    records = [pair(1, line=1), pair(0, line=2), pair(line=3, VQ=(1.0, 1.0)), pair(line=4), pair(line=5, VQ=(1.0, 1.1))]
    assert [made.line for made in decided(records)] == [1, 5]
    assert [made.line for made in decided(records, tie_eps=0.2)] == [1]
    close = [pair(1, annotator=name, VQ=(1.1, 1.0)) for name in ("vq", "human", None)]
    assert len(decided(close)) == 3
    with pytest.raises(UserError, match="3 tied"):
        decided(close, tie_eps=0.2)


def test_people_are_believed_where_scores_are_equal():
    assert len(decided([pair(1, annotator="human", VQ=(1.0, 1.0))])) == 1


def test_groups_give_their_best_and_worst():
    records = [group(VQ=(1.0, 5.0, 3.0), line=1), group(VQ=(2.0, 2.0), line=2), pair(-1, line=3)]
    made = decided(records)
    assert [(one.line, one.label) for one in made] == [(1, 1), (3, 1)]
    assert places(made[:1]) == [(1, 0)]


def test_nothing_to_learn_from_says_why():
    records = [pair(0), pair(), pair(VQ=(1.0, 1.0)), group(VQ=(2.0, 2.0)), group(VQ=(1.0, None)), group(VQ=(1.0,))]
    with pytest.raises(UserError) as caught:
        decided(records, key="data.held_out")
    assert str(caught.value).startswith("data.held_out: no pair to learn from: 3 tied and 3 unlabelled; ")


def test_records_are_left_as_they_are(tmp_path):
    """Other code has extended a stored list in place, and scored the extended one later."""
    scored = group(VQ=(1.0, 5.0, 3.0), MQ=(1.0, 2.0, None))
    both = pair(-1, {"VQ": -1}, VQ=(1.0, 2.0), MQ=(0.0, 1.0))._replace(segment_labels=(1, -1))
    before = copy.deepcopy((scored, both))
    made = [
        *best_worst(scored),
        *all_pairs(scored, "VQ"),
        *pareto_pairs(scored, ["VQ", "MQ"], "VQ", 0.5),
        *decided([scored, both]),
        exchanged(both),
    ]
    rarity_weights([both, both], 1.0), standard_gaps([both, both])
    for one in made:
        one.scores["new"] = (0.0, 0.0)
        one.labels["new"] = 1
    for record in (scored, both):
        row = to_json(record, tmp_path)
        row.get("members", []).append({})
        for table in ("scores", "labels"):
            row.setdefault(table, {}).clear()
    assert (scored, both) == before
    row = to_json(both, tmp_path)
    kept = copy.deepcopy(row)
    parse_record(row, tmp_path, 1)
    assert row == kept
