"""What is said about the numbers, and which judges are strangers to a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from alignment.config import EvaluationConfig, ModelConfig, Recipe, RewardConfig
from benchmarks.winning.charts import Bar, bars, distributions
from benchmarks.winning.judges import relation
from benchmarks.winning.models import Contender
from benchmarks.winning.rates import Change, Rate
from benchmarks.winning.summary import Row, about_judges, about_measures, verdict
from rewards.arguments import RewardArgument

WIN, LOSS, LEVEL = (Rate(r, r - 0.1, r + 0.1, 0.01, 1, 1, 1, 0) for r in (0.8, 0.2, 0.5))


def row(judge: str, relation: str, rate: Rate) -> Row:
    return Row(judge, "overall", relation, rate, None, None, [])


def titles(*rows: Row) -> list[str]:
    return [finding.title for finding in about_judges(rows)]


def test_winning_by_the_training_judge_alone_is_a_suspicion() -> None:
    rows = row("motion", "trained on", WIN), row("clip", "independent", LOSS), row("hps", "independent", WIN)
    assert titles(*rows) == ["Reward hacking?"]
    (finding,) = about_judges(rows)
    assert finding.level == "alarm"
    assert "\n" not in finding.text
    assert "80% (70 to 90) by motion" in finding.text
    assert "20% (10 to 30)" in finding.text
    assert verdict("tuned", rows).startswith("Strangers would not agree about tuned: it wins 20%")


@pytest.mark.parametrize(
    ("rows", "start", "title"),
    [
        (
            [("independent", WIN), ("trained on", WIN)],
            "tuned got better, and a stranger would agree",
            "Strangers agree",
        ),
        ([("independent", LOSS)], "tuned got worse", "A stranger prefers the base"),
        (
            [("independent", LEVEL), ("trained on", WIN)],
            "Nothing shows that a stranger would tell",
            "No sure difference",
        ),
        ([("independent", LEVEL), ("independent", WIN)], "tuned got better for some strangers", "No sure difference"),
        (
            [("trained on", WIN), ("related", WIN)],
            "Whether a stranger would",
            "No judge is independent",
        ),
        ([("unknown", WIN)], "Whether a stranger would", "No judge is known to be independent"),
        ([("independent", WIN), ("trained on", LEVEL)], "tuned got better", "Training did not show"),
    ],
)
def test_verdicts(rows: list[tuple[str, Rate]], start: str, title: str) -> None:
    rows = [row(f"judge{i}", *given) for i, given in enumerate(rows)]
    assert verdict("tuned", rows).startswith(start)
    assert title in titles(*rows)


def test_pairs_without_an_answer_are_told() -> None:
    (finding,) = about_judges([row("clip", "related", LEVEL._replace(masked=2)), row("hps", "independent", WIN)])[:1]
    assert "2 of 5 pairs" in finding.text


def test_lost_motion_and_diversity_are_told() -> None:
    still = {"dynamic_degree": Change(0.5, 0.1, -0.4, -0.5, -0.3, 9), "flow": Change(9, 2, -7, -8, -6, 9)}
    assert [finding.title for finding in about_measures(still)] == ["Less motion"]
    alike = {"diversity": Change(0.2, 0.1, -0.1, -0.12, -0.08, 9), "brightness": Change(0.3, 0.5, 0.2, 0.1, 0.3, 9)}
    assert [finding.title for finding in about_measures(alike)] == ["Less diverse", "The pictures changed"]
    unsure = {name: change._replace(high=0.1) for name, change in (still | alike).items()}
    unsure["brightness"] = unsure["brightness"]._replace(low=-0.1)
    assert not about_measures(unsure)


def contender(folder: Path, **evaluation: Any) -> Contender:
    rewards = {
        "mix": RewardConfig("weighted", 1.0, {"rewards": {"a": "sprite_motion", "b": {"use": "sprite_match"}}}),
        "clip": RewardConfig("clip", 0.5, {"path": str(folder / "clip"), "frames": 4}),
        "kept": RewardConfig("hpsv2", 0.0, {"path": "hps"}),
    }
    recipe = Recipe("r", model=ModelConfig("m"), rewards=rewards, evaluation=EvaluationConfig(**evaluation))
    return Contender("tuned", "run", recipe, folder)


@pytest.mark.parametrize(
    ("use", "options", "expected"),
    [
        ("clip", {"path": "clip", "frames": 4}, "trained on"),  # the same folder by another path
        ("clip", {"path": "clip", "frames": 8}, "related"),
        ("clip", {"path": "other", "frames": 4}, "related"),
        ("sprite_motion", {}, "trained on"),  # a part of the weighted sum
        ("win_rate", {"judge": "sprite_match"}, "trained on"),
        ("weighted", {"rewards": {"x": "sprite_shape"}}, "independent"),
        ("hpsv2", {"path": "hps"}, "independent"),
    ],
)
def test_relation_of_a_judge(tmp_path, monkeypatch, use, options, expected) -> None:
    (tmp_path / "clip").mkdir()
    monkeypatch.chdir(tmp_path)
    assert relation(RewardArgument("name", use, options), contender(tmp_path)) == expected


def test_who_chose_the_weights_is_no_stranger(tmp_path) -> None:
    judge = RewardArgument("h", "hpsv2", {"path": "hps"})
    assert relation(judge, contender(tmp_path, watch="kept", patience=2, every=1)) == "selected by"
    assert relation(judge, contender(tmp_path, watch="kept", every=1)) == "independent"
    assert relation(judge, contender(tmp_path)._replace(run=None)) == "unknown"


def test_charts_escape_and_draw_nothing_of_nothing() -> None:
    html = bars([Bar("<b>", 0.5, 0.4, 0.6, "50%", 0), Bar("none", math.nan, math.nan, math.nan, "n/a", 1)])
    assert "<b>" not in html
    assert html.count("<rect") == 1
    assert bars([]) == distributions("t", [("base", [math.nan], 0)]) == ""
    figure = distributions("<i>", [("base", [1.0, 1.0], 0), ("tuned", [1.0, math.nan], 1)])
    assert figure.count("<polyline") == 2
    assert "<i>" not in figure.replace('<i class="', "")
