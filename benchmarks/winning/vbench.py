"""VBench's arithmetic: Quality, Semantic and Total from the scores of its 16 dimensions.

The scores themselves come from VBench's own command (DINO, CLIP, RAFT, AMT, MUSIQ, GRiT, UMT and ViCLIP weights).
Source: github.com/Vchitect/VBench, scripts/constant.py and scripts/cal_final_score.py at 7975661 and 5ebbf0b. There a
dimension without a score counts as 0; here it is named, and what depends on it is None.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignment.errors import Problems, UserError, one_line

# Dimension: its lowest and highest score, mapped to 0 and 1.
QUALITY = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "dynamic_degree": (0.0, 1.0),
    "aesthetic_quality": (0.0, 1.0),
    "imaging_quality": (0.0, 1.0),
}
SEMANTIC = {
    "object_class": (0.0, 1.0),
    "multiple_objects": (0.0, 1.0),
    "human_action": (0.0, 1.0),
    "color": (0.0, 1.0),
    "spatial_relationship": (0.0, 1.0),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
RANGES = {**QUALITY, **SEMANTIC}
WEIGHTS = {name: 0.5 if name == "dynamic_degree" else 1.0 for name in RANGES}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4.0, 1.0


class VBenchScores(NamedTuple):
    normalised: dict[str, float]  # of the dimensions that were given; published ranges, so that 0 to 1 is usual
    quality: float | None  # weighted mean of the normalised dimensions, where all 7 are given
    semantic: float | None  # where all 9 are
    total: float | None  # (4 quality + semantic) / 5
    missing: list[str]  # dimensions that no score was given for


def aggregate(scores: Mapping[str, float]) -> VBenchScores:
    """Total score from the dimensions' raw scores, as fractions (VBench's files have them so).

    Raises: UserError with a line for each name that is no dimension and each score outside of 0 to 1.
    """
    _check("scores", scores)
    normalised = {k: (scores[k] - low) / (high - low) for k, (low, high) in RANGES.items() if k in scores}
    quality, semantic = _mean(normalised, QUALITY), _mean(normalised, SEMANTIC)
    total = None
    if quality is not None and semantic is not None:
        total = (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
    return VBenchScores(normalised, quality, semantic, total, [k for k in RANGES if k not in scores])


def read_scores(path: str | Path) -> dict[str, float]:
    """Raw scores from VBench's result files, for `aggregate`.

    Args:
        path: a JSON file {dimension: [score, [one entry a video]]}, as VBench writes (NAME_eval_results.json), or plain
            {dimension: score}; or a folder of such files, which VBench fills by one dimension a run. Names with
            spaces, as on the leaderboard, are fine.
    Raises: UserError, one line each: no such file, not JSON, no dimension, not a fraction, a dimension in two files.
    """
    path = Path(path).expanduser()
    files = sorted(path.glob("*_eval_results.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no file *_eval_results.json in this folder")
    scores: dict[str, float] = {}
    for file in files:
        found = _read(file)
        _check(str(file), found)
        if twice := sorted(scores.keys() & found.keys()):
            raise UserError(f"{file}: {', '.join(twice)} is in another file of the folder, too; keep one of them")
        scores |= found
    return scores


def _mean(normalised: Mapping[str, float], dimensions: Sequence[str] | Mapping[str, Any]) -> float | None:
    if not all(name in normalised for name in dimensions):
        return None
    return sum(WEIGHTS[k] * normalised[k] for k in dimensions) / sum(WEIGHTS[k] for k in dimensions)


def _read(file: Path) -> dict[str, Any]:
    try:
        rows = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON: {one_line(error)}") from error
    if not isinstance(rows, dict) or not rows:
        raise UserError(f"{file}: not VBench's results; an object with a score for each dimension is needed")
    scores = {key.strip().replace(" ", "_"): value for key, value in rows.items()}
    return {key: value[0] if isinstance(value, list) and value else value for key, value in scores.items()}


def _check(where: str, scores: Mapping[str, Any]) -> None:
    problems = [
        f"{where}: {name!r} is no dimension of VBench ({', '.join(RANGES)})" for name in scores if name not in RANGES
    ]
    for name in RANGES.keys() & scores.keys():
        score = scores[name]
        if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
            problems.append(f"{where}: {name} is no number but {score!r:.60}")
        elif not 0 <= score <= 1:
            problems.append(
                f"{where}: {name} is {score:g}; scores are fractions from 0 to 1 (divide percentages by 100)"
            )
    if problems:
        raise Problems(problems)
