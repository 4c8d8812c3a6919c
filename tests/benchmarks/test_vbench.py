"""VBench's arithmetic against published rows, and the layouts of its result files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alignment.errors import UserError
from benchmarks.winning.vbench import QUALITY, RANGES, SEMANTIC, aggregate, read_scores

# Percentages from Show-o2 (arXiv 2506.15564v3), Table 8, in the order of RANGES; then Quality, Semantic, Total.
PUBLISHED = {
    "LaVie": (
        [
            91.41,
            97.47,
            98.30,
            96.38,
            49.72,
            54.94,
            61.90,
            91.82,
            33.32,
            96.80,
            86.39,
            34.09,
            52.69,
            23.56,
            25.93,
            26.41,
        ],
        (78.78, 70.31, 77.08),
    ),
    "CogVideoX-5B": (
        [
            96.23,
            96.52,
            98.66,
            96.92,
            70.97,
            61.98,
            62.90,
            85.23,
            62.11,
            99.40,
            82.81,
            66.35,
            53.20,
            24.91,
            25.38,
            27.59,
        ],
        (82.75, 77.04, 81.61),
    ),
    "Kling": (
        [
            98.33,
            97.60,
            99.30,
            99.40,
            46.94,
            61.21,
            65.62,
            87.24,
            68.05,
            93.40,
            89.90,
            73.03,
            50.86,
            19.62,
            24.17,
            26.42,
        ],
        (83.39, 75.68, 81.85),
    ),
}


def scores_of(model: str) -> dict[str, float]:
    return {name: value / 100 for name, value in zip(RANGES, PUBLISHED[model][0], strict=True)}


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_totals(model: str) -> None:
    result = aggregate(scores_of(model))
    assert (result.quality, result.semantic, result.total) == pytest.approx(
        [value / 100 for value in PUBLISHED[model][1]], abs=1e-4
    )
    assert result.missing == []


def test_by_hand() -> None:
    scores = {name: low for name, (low, _) in RANGES.items()}
    assert aggregate(scores).total == pytest.approx(0)
    result = aggregate(scores | {"dynamic_degree": 1.0, "scene": 0.4111})  # 0.5 / 6.5; (0.4111 / 0.8222) / 9
    assert result.normalised["scene"] == pytest.approx(0.5)
    assert (result.quality, result.semantic) == pytest.approx((1 / 13, 1 / 18))
    assert result.total == pytest.approx((4 / 13 + 1 / 18) / 5)


def test_what_is_missing_is_named_and_the_rest_is_computed() -> None:
    scores = {name: value for name, value in scores_of("LaVie").items() if name not in ("color", "scene")}
    result = aggregate(scores)
    assert result.quality == pytest.approx(0.7878, abs=1e-4)
    assert (result.semantic, result.total) == (None, None)
    assert result.missing == ["color", "scene"]
    assert set(result.normalised) == set(QUALITY) | set(SEMANTIC) - {"color", "scene"}


def test_layouts(tmp_path: Path) -> None:
    scores = scores_of("Kling")
    plain, nested = tmp_path / "plain.json", tmp_path / "a_eval_results.json"
    plain.write_text(json.dumps({name.replace("_", " "): value for name, value in scores.items()}))
    assert read_scores(plain) == scores
    videos = [{"video_path": "x.mp4", "video_results": True}]
    nested.write_text(json.dumps({name: [scores[name], videos] for name in QUALITY}))
    assert read_scores(nested) == {name: scores[name] for name in QUALITY}
    (tmp_path / "b_eval_results.json").write_text(json.dumps({name: [scores[name], videos] for name in SEMANTIC}))
    assert read_scores(tmp_path) == scores
    (tmp_path / "c_eval_results.json").write_text(json.dumps({"color": [0.5, videos]}))
    with pytest.raises(UserError, match=r"c_eval_results.json: color is in another file"):
        read_scores(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[" * 100000, "not JSON"),
        ("[1]", "an object with a score"),
        ("{}", "an object with a score"),
        ('{"colour": 0.5}', "'colour' is no dimension of VBench"),
        ('{"color": "high"}', "color is no number but 'high'"),
        ('{"color": []}', "color is no number"),
        ('{"color": true}', "color is no number"),
        ('{"color": NaN}', "color is no number"),
        ('{"imaging_quality": [66.9, []]}', "imaging_quality is 66.9; scores are fractions"),
    ],
)
def test_what_is_no_result_is_refused(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "scores.json"
    path.write_text(text)
    with pytest.raises(UserError, match=reason) as caught:
        read_scores(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_scores(tmp_path / "none.json")
    with pytest.raises(UserError, match="no file"):
        read_scores(tmp_path)
