"""Published figures, in percent, each with its source. Figures that could not be checked are left out."""

from __future__ import annotations

from typing import NamedTuple

BOARD = "leaderboard kwaivgi-videogen-rewardbench.hf.space, 2025-02"
CARD = "model card CodeGoat24/UnifiedReward-7b-v1.5"
HPS = "README of github.com/tgxs002/HPSv2"


class Published(NamedTuple):
    model: str
    values: dict[tuple[str, str], float]  # (measure, dimension) -> percent
    source: str


def _board(model: str, without: tuple[float, ...], ties: tuple[float, ...], source: str = BOARD) -> Published:
    dims = ("Overall", "VQ", "MQ", "TA")
    values = {("without_ties", dim): value for dim, value in zip(dims, without, strict=True)}
    return Published(model, values | {("with_ties", dim): v for dim, v in zip(dims, ties, strict=True)}, source)


def _overall(model: str, source: str, **values: float) -> Published:
    return Published(model, {(measure, "Overall"): value for measure, value in values.items()}, source)


PUBLISHED = {
    "videogen_rewardbench": [
        _board("VideoReward", (73.59, 75.66, 74.70, 72.20), (61.26, 59.68, 66.03, 53.80)),
        _board("VisionReward", (67.59, 59.03, 60.98, 61.15), (56.77, 47.43, 59.03, 46.56)),
        _board(
            "LiFT",
            (57.26, 55.97, 54.91, 55.43),
            (39.08, 47.53, 59.04, 33.79),
            "arXiv 2501.13918v1, table 2; its ties were resolved at random",
        ),
        _board("random", (50.30, 49.86, 49.64, 50.40), (41.86, 47.42, 59.07, 37.25)),
        _board("VideoScore", (50.22, 47.72, 51.09, 50.34), (41.80, 47.41, 59.05, 37.24)),
        _overall("VR-Thinker-7B", "arXiv 2510.10518, abstract; a protocol of its own", without_ties=80.5),
    ],
    "genai_bench": [
        _overall("VideoScore", CARD, without_ties=70.6, with_ties=46.2),
        _overall("LiFT", CARD, without_ties=60.1, with_ties=41.2),
        _overall("VisionReward", CARD, without_ties=73.1, with_ties=52.1),
        _overall("VideoReward", CARD, without_ties=73.3, with_ties=50.2),
        _overall("MJ-VIDEO", "README of github.com/aiming-lab/MJ-Video", without_ties=70.28),
        _overall("VR-Thinker-7B", "arXiv 2510.10518, abstract", without_ties=82.3),
    ],
    "mj_bench_video": [
        _overall("VideoScore", "README of github.com/aiming-lab/MJ-Video (69 of 118)", strict=58.47),
        _overall("MJ-VIDEO", "README of github.com/aiming-lab/MJ-Video (fits 77 of 112)", strict=68.75),
        _overall("VR-Thinker-7B", "arXiv 2510.10518, abstract", strict=75.6),
    ],
    "hpdv2": [
        _overall(model, HPS, ranking=value)
        for model, value in {
            "Aesthetic": 76.8,
            "ImageReward": 74.0,
            "HPS": 77.6,
            "PickScore": 79.8,
            "single human": 78.1,
            "HPSv2": 83.3,
            "HPSv2.1": 84.1,
        }.items()
    ],
    "image_reward": [
        _overall(model, HPS, by_prompt=value)
        for model, value in {
            "Aesthetic": 57.4,
            "ImageReward": 65.1,
            "HPS": 61.2,
            "PickScore": 62.9,
            "single human": 65.3,
            "HPSv2": 65.7,
            "HPSv2.1": 66.8,
        }.items()
    ],
}
