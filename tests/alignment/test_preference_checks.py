"""Findings about preference runs: each fires on a log that was planted to show it, none on a healthy one."""

import pytest
from omegaconf import OmegaConf

from alignment.alarms import ENOUGH, Alarms
from alignment.algorithms.flow_dpo import Config
from alignment.config import Recipe
from alignment.diagnostics import diagnose

from .fake_run import PAIR_CONFIG, RANGES, make_metrics, make_pair_metrics, make_scores, sampled

CONFIG = OmegaConf.to_container(OmegaConf.create(PAIR_CONFIG))
TOLD = "Pairs are told apart"


def with_settings(**changed) -> dict:
    """The recipe with some settings of its algorithm, or its data (preferences), changed."""
    data = {key: changed.pop(key) for key in ("preferences",) if key in changed}
    return CONFIG | {"algorithm": CONFIG["algorithm"] | changed, "data": CONFIG["data"] | data}


ONLINE = with_settings(preferences=None)


def found(metrics, config=None) -> dict[str, str]:
    """Title -> level."""
    return {finding.title: finding.level for finding in diagnose(metrics, [], config or CONFIG)}


def text_of(title, metrics, config=None) -> str:
    (text,) = [finding.text for finding in diagnose(metrics, [], config or CONFIG) if finding.title == title]
    return text


def planted(values: dict, metrics=None) -> list[dict]:
    """With these values in every iteration, those of evaluations in the lines of evaluations."""
    return [
        line | {k: v for k, v in values.items() if not k.startswith("eval/") or k in line}
        for line in metrics or make_pair_metrics()
    ]


def test_a_healthy_run_is_praised():
    """Half of the accuracies of its last third are above 0.70; the last evaluation found 0.61."""
    metrics = make_pair_metrics()
    assert found(metrics) == {TOLD: "good"}
    late = [line["implicit_accuracy"] for line in metrics[80:]]
    text = text_of(TOLD, metrics)
    assert f"{sum(late) / 40:.1%} of the training pairs" in text
    assert "61.4% of the held-out ones" in text
    assert found(sampled(metrics), ONLINE) == {TOLD: "good"}
    assert "held-out" not in text_of(TOLD, sampled(metrics), ONLINE)


DISPLACED = {"error/winner": 1.03, "error/loser": 1.06}
PLANTED = [
    (
        "Likelihood displacement",
        DISPLACED,
        "1.030 times the reference's, the worse ones' 1.060 times, while the margin grew from 0 to 0.5",
    ),
    ("Likelihood displacement", DISPLACED, "lower `optimizer.lr` (now 0.0001), raise"),
    (
        "Likelihood displacement",
        DISPLACED,
        "raise `algorithm.beta` (now 500.0), raise `algorithm.anchor` (now 0.0), or let `algorithm.max_winner_error`",
    ),
    ("Better members are fitted worse", {"error/winner": 1.03, "error/loser": 0.99}, "`optimizer.lr` (now 0.0001)"),
    ("Better members are fitted worse", DISPLACED | {"margin": -0.2}, "1.030 times the reference's"),
    (
        "Little was learned",
        {"margin": 0.01, "margin/size": 0.02, "implicit_accuracy": 0.6, "error/winner": 0.999, "error/loser": 1.0},
        "made 110. Train longer, or raise `optimizer.lr`",
    ),
    (
        "Little was learned",
        {"margin": 0.01, "margin/size": 0.02, "error/winner": 0.9},
        "moved by 10% all the same, which beta should hold: raise `algorithm.beta` (now 500.0)",
    ),
    ("Pairs are not told apart", {"implicit_accuracy": 0.52}, "`algorithm.tie_eps` (now 0.0)"),
    ("Pairs were memorised", {"implicit_accuracy": 0.99, "eval/pairs/implicit_accuracy": 0.52}, "52% of the held-out"),
    ("Few samples carry everything", {"weight/effective": 0.07}, "worth 7% of them"),
]


@pytest.mark.parametrize(("title", "values", "words"), PLANTED)
def test_planted_in_every_iteration(title, values, words):
    metrics = planted(values)
    assert {name: level for name, level in found(metrics).items() if level != "good"} == {title: "warning"}
    assert words in text_of(title, metrics)


@pytest.mark.parametrize(
    ("title", "values", "words"),
    [
        ("Held-out pairs are not told apart", {"eval/pairs/implicit_accuracy": 0.52}, "but 52% of the held-out ones"),
        ("Every gradient is clipped", {"grad_norm": 6.0}, "6.00, always above `optimizer.max_grad_norm` (now 1.0)"),
        (
            "Margins come from one range of noise levels",
            {f"margin/levels_{name}": 2.0 if name == "0.75_1.00" else 0.1 for name in RANGES},
            "2.00 at noise levels 0.75 to 1.00 and 0.300 in the other ranges",
        ),
    ],
)
def test_what_is_noted(title, values, words):
    metrics = planted(values)
    assert {name: level for name, level in found(metrics).items() if level != "good"} == {title: "note"}
    assert words in text_of(title, metrics)


def test_thresholds_are_on_the_safe_side():
    """What a run may well do: a winner's error of 1.015, some large margins late, levels that differ by a factor."""
    assert found(planted({"error/winner": 1.015, "error/loser": 1.03})) == {TOLD: "good"}
    late = make_pair_metrics()
    for line in late[115:]:
        line["margin/size"] = 7.0
    assert found(late) == {TOLD: "good"}
    uneven = dict(zip(RANGES, (0.1, 0.2, 1.0, 3.8), strict=True))
    assert found(planted({f"margin/levels_{name}": value for name, value in uneven.items()})) == {TOLD: "good"}
    assert found(planted({"weight/effective": 0.2})) == {TOLD: "good"}


def test_margins_that_run_away():
    """One iteration above 5 may be an odd batch; two early ones are not."""
    metrics = make_pair_metrics()
    metrics[20]["margin/size"] = 30.0
    assert "Margins run away" not in found(metrics)
    metrics[30]["margin/size"] = 9.0
    assert found(metrics)["Margins run away"] == "warning"
    text = text_of("Margins run away", metrics)
    assert "in 2 iterations and was 30.0 at iteration 21" in text
    assert "First lower `optimizer.lr` (now 0.0001), then change `algorithm.beta` (now 500.0)" in text
    online = sampled(make_pair_metrics())  # 4 updates an iteration: a hundred are done after 25, and 10 of warm-up
    for line in online[35:]:
        line["margin/size"] = 9.0
    assert "Margins run away" not in found(online, ONLINE)
    online[34]["margin/size"] = online[33]["margin/size"] = 9.0
    assert "Margins run away" in found(online, ONLINE)


def test_memory_without_held_out_pairs_is_not_watched():
    metrics = [
        {k: v for k, v in line.items() if not k.startswith("eval/")} for line in planted({"implicit_accuracy": 0.99})
    ]
    assert found(metrics) == {"No watch on memorising": "note"}
    assert "`data.held_out`" in text_of("No watch on memorising", metrics)
    assert found(sampled(metrics), ONLINE) == {TOLD: "good"}  # pairs that are new every time
    assert found([line | {"reference/age": 3} for line in metrics]) == {TOLD: "good"}  # as are the rivals of seppo


def test_a_judgement_takes_a_hundred_updates_or_the_whole_run():
    """Warm-up does not count; sampled pairs are learned from several times."""
    metrics = planted({"margin/size": 0.02, "margin": 0.01})
    title = "Little was learned"
    assert title not in found(metrics[:109])
    assert title in found(metrics[:110])
    assert title not in found(sampled(metrics)[:34], ONLINE)
    assert title in found(sampled(metrics)[:35], ONLINE)
    short = CONFIG | {"iterations": 30}
    assert title not in found(metrics[:29], short)
    assert title in found(metrics[:30], short)
    assert title not in found(metrics[:29], CONFIG | {"iterations": 29})  # 19 updates after the warm-up


def test_a_renewed_reference_makes_small_margins():
    metrics = planted({"margin/size": 0.02, "margin": 0.01, "implicit_accuracy": 0.5})
    assert found(metrics, with_settings(renew_reference=5)) == {}
    assert found(planted({"margin/size": 0.02}), with_settings(renew_reference=5)) == {TOLD: "good"}


@pytest.mark.parametrize(("tied", "level"), [(0.4, None), (0.6, "warning"), (0.95, "alarm")])
def test_ties(tied, level):
    metrics = [line | {"pairs/tied": tied} for line in sampled(make_pair_metrics())]
    assert found(metrics, ONLINE).get("Many ties") == level
    if level:
        text = text_of("Many ties", metrics, ONLINE)
        assert f"{tied:.0%} of the groups" in text
        assert "raise `algorithm.group_size` (now 4)." in text
        eps = text_of("Many ties", metrics, ONLINE | {"algorithm": ONLINE["algorithm"] | {"tie_eps": 0.1}})
        assert "or lower `algorithm.tie_eps` (now 0.1)" in eps


def test_a_dead_reward_is_told_of_once():
    """No pair, no update, so no gradient and no loss: that is no gradient that is not finite."""
    dead = {"reward/std": 0.0, "pairs": 0, "pairs/tied": 1.0, "nfe/update": 0, "grad_norm": None}
    metrics = [
        {k: v for k, v in line.items() if k not in ("loss", "implicit_accuracy")} | dead
        for line in sampled(make_pair_metrics())
    ]
    assert found(metrics, ONLINE) == {"The reward is dead": "alarm"}
    some = sampled(make_pair_metrics())
    some[50] = metrics[50]
    assert found(some, ONLINE) == {TOLD: "good"}


def test_a_run_that_its_winners_ended():
    metrics = make_pair_metrics()[:70]
    config = with_settings(max_winner_error=1.02)
    assert "Not finished" in found(metrics, config)
    metrics[-1]["error/winner"] = 1.04
    title = "Stopped where better members drift away"
    assert found(metrics, config)[title] == "note"
    assert "70 of 120 iterations are logged" in text_of(title, metrics, config)
    assert "Not finished" in found(metrics)


def test_policy_gradient_runs_are_not_judged_by_this():
    assert not {title for title in found(make_metrics(120), {}) if "air" in title or "argin" in title}


@pytest.mark.parametrize(("gain", "title"), [(-0.2, "The reward fell"), (0.0, "No significant gain")])
def test_nothing_was_trained_on_the_reward_that_evaluations_report(gain, title):
    prompts = [f"prompt {i}" for i in range(32)]
    evaluations = [make_scores(0, 0.0, prompts, 0), make_scores(120, gain, prompts, 0)]
    texts = {f.title: f.text for f in diagnose(make_pair_metrics(), evaluations, CONFIG)}
    assert "prompts the reward changed by" in texts[title]
    assert not [words for words in ("trained reward", "first ratio", "samples a prompt") if words in texts[title]]
    online = {f.title: f.text for f in diagnose(sampled(make_pair_metrics()), evaluations, ONLINE)}
    assert "the trained reward changed by" in online[title]


def said(metrics, folder) -> list[list[str]]:
    """The titles that are new on the terminal after every iteration."""
    recipe = Recipe(name="x", output=str(folder), iterations=len(metrics), algorithm=Config())
    alarms = Alarms(recipe, [])
    lines = [alarms.new(metrics[:end], ended=end == len(metrics)) for end in range(1, len(metrics) + 1)]
    return [[line.partition(". ")[0] for line in new] for new in lines]


def test_the_terminal_is_told_while_the_run_goes_on(tmp_path):
    """Displacement after nine iterations, too few pairs learned after a hundred, neither on a healthy run."""
    assert said(make_pair_metrics(), tmp_path) == [[]] * 120
    drifting = said(planted({"error/winner": 1.04, "error/loser": 1.08, "margin": 1.0}), tmp_path)
    assert drifting[8] == ["warning: Likelihood displacement"]
    assert sum(drifting, []) == drifting[8]
    slow = said(planted({"margin": 0.01, "margin/size": 0.02, "error/winner": 1.0}), tmp_path)
    assert slow[99] == ["warning: Little was learned"]
    assert sum(slow, []) == slow[99]
    away = said(planted({"margin/size": 6.0}), tmp_path)
    assert away[ENOUGH - 1] == ["warning: Margins run away"]
