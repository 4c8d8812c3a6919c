"""Asking rewards for rows: each sees its own frames, and one clip's failure is that clip's alone.

A row has, for every reward, `<name>` and `<name>/<dim>` (a number or None), `<name>:valid`, and, if asked for,
`<name>:dense`; `error` says why something failed.
"""

from __future__ import annotations

import math
import traceback
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rewards.contract import Clip, Reward, RewardError, Scores, answers, one_line

Row = dict[str, Any]
Answer = Scores | Exception


class RewardFailed(Exception):
    """A reward that raised something else than a RewardError: a fault in it, not in a clip."""

    def __init__(self, name: str, error: Exception):
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = one_line(error)
        super().__init__(
            f"reward {name}: {type(error).__name__}: {reason} ({Path(place.filename).name}:{place.lineno})"
        )


def ask(rewards: Mapping[str, Reward], clips: Sequence[Clip], dense: bool = False) -> list[Row]:
    """Score N clips whose videos are still bytes (F, 3, H, W): one row a clip, without what is known of its file.

    Raises: RewardFailed.
    """
    rows: list[Row] = [{"error": None} for _ in clips]
    with torch.no_grad():
        for names, seen in _by_frames(rewards, clips):
            for name, answer in answers({name: rewards[name] for name in names}, seen).items():
                for row, (scores, place) in zip(rows, _for_each(rewards[name], answer, seen), strict=True):
                    _write(row, name, scores, place, dense)
    return rows


def failed_row(names: Sequence[str], error: str) -> Row:
    """The row of a clip that could not be read."""
    return {"error": error, **dict.fromkeys(names), **{f"{name}:valid": False for name in names}}


def _by_frames(rewards: Mapping[str, Reward], clips: Sequence[Clip]):
    """Groups of rewards that look at the same frames, each with these frames of the clips, in [0, 1].

    A clip of full length in float would take four times the memory of its bytes; most rewards look at a few frames.
    """
    groups = defaultdict(list)
    for name, reward in rewards.items():
        whole = [range(len(clip.video)) for clip in clips]
        try:
            looks = [[a[i] for i in reward.indices(len(a), clip.fps)] for a, clip in zip(whole, clips, strict=True)]
        except RewardError:  # it will say so again when it is asked
            looks = whole
        except Exception as error:  # of a user's reward, or a frame that is not there
            raise RewardFailed(name, error) from error
        groups[tuple(map(tuple, looks))].append(name)
    for looks, names in groups.items():
        parts = [clip.frames(look) for clip, look in zip(clips, looks, strict=True)]
        yield names, [replace(part, video=part.video.contiguous().float().div_(255)) for part in parts]


def _for_each(
    reward: Reward, answer: Scores | Exception, clips: Sequence[Clip]
) -> list[tuple[Scores | Exception, int]]:
    """For each clip the answer that holds its score, and its place there; after a failure each clip is asked alone."""
    if isinstance(answer, Exception) and reward.scope == "clip" and len(clips) > 1:
        return [(answers({"": reward}, [clip])[""], 0) for clip in clips]
    return [(answer, place) for place in range(len(clips))]


def _write(row: Row, name: str, scores: Answer, place: int, dense: bool) -> None:
    if isinstance(scores, Exception) and not isinstance(scores, RewardError):
        raise RewardFailed(name, scores) from scores
    if isinstance(scores, RewardError):
        row["error"] = "; ".join(filter(None, [row["error"], " ".join(str(scores).split())]))
        row |= {name: None, f"{name}:valid": False}
        return
    row[name] = _number(scores.total[place])
    row |= {f"{name}/{dim}": _number(values[place]) for dim, values in scores.dims.items()}
    row[f"{name}:valid"] = bool(scores.valid[place])
    if dense:
        row[f"{name}:dense"] = None if scores.dense is None else [_number(value) for value in scores.dense[place]]


def _number(value: torch.Tensor) -> float | None:
    number = float(value)
    return float(f"{number:.9g}") if math.isfinite(number) else None  # nine digits are all that a float32 has
