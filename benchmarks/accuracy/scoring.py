"""Scoring a benchmark's media: each once, whatever the number of pairs, and never again where a score is kept.

A reward that scores clips alone is asked for each clip. One that compares (scope "group") is asked for each pair, and
its two totals are what each clip won against the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from alignment.distributed import Processes
from alignment.errors import TrainingStopped
from rewards.arguments import RewardArgument
from rewards.contract import Clip, Reward, RewardError
from rewards.scoring.asking import ask
from rewards.scoring.command import ahead, load_all
from rewards.video_files import read_video

from .cache import Reading, ScoreCache
from .data import Benchmark
from .fingerprints import describe, fingerprint, hash_of

Answer = list[Reading] | str  # of each clip of a unit, or why there is none
Unit = tuple[int, ...]  # places in Benchmark.items that are scored together: one, or the two of a pair


class Scored(NamedTuple):
    """What one reward said."""

    argument: RewardArgument
    described: dict[str, Any]
    fingerprint: str
    scope: str
    readings: list[tuple[Reading, Reading] | None]  # of each pair; None where there is none
    failed: dict[str, str]  # media -> why
    kept: int  # of the scores, how many were there already
    asked: int


def hashes(found: Benchmark) -> list[str]:
    """Of each item's file."""
    paths = list(dict.fromkeys(item.path for item in found.items))
    with ThreadPoolExecutor() as pool:
        known = dict(zip(paths, pool.map(hash_of, paths), strict=True))
    return [known[item.path] for item in found.items]


def score(
    argument: RewardArgument,
    found: Benchmark,
    contents: Sequence[str],
    cache: Path,
    processes: Processes,
    console: Console,
    batch: int = 1,
    max_failed: float = 0.05,
) -> Scored:
    """What a reward says of every pair.

    Args:
        contents: `hashes(found)`.
        cache: folder of kept scores.
        batch: clips (or pairs) a call.
        max_failed: share of media (or pairs) that may fail; each failure leaves a NaN.
    Raises: RewardError where the reward cannot be loaded; TrainingStopped where too much fails.
    """
    described = describe(argument)
    mark = fingerprint(described)
    kept = ScoreCache(cache, argument.name, described, mark)
    scope, reward = kept.scope, None
    processes.wait()  # before it is written, so that all see the same
    if scope is None:
        reward = load_all({argument.name: argument})[argument.name]
        scope = reward.scope
        if processes.is_main:
            kept.start(scope)
        processes.wait()
    keys = pair_keys(found, contents, scope)
    units = _units(found, keys)
    there = kept.read().readings
    left = [key for key in units if key not in there]
    processes.wait()  # before anything is written, so that all see the same left
    if left:
        reward = reward or load_all({argument.name: argument})[argument.name]
        mine = processes.share(left)
        answered = _answered(argument.name, reward, found, {key: units[key] for key in mine}, batch)
        title = argument.name if processes.is_main else None
        with kept.writer(processes.rank) as write:
            _written(_shown(answered, len(mine), title, console), write, max_failed * len(units) / processes.count)
        processes.wait()
    readings, reasons = kept.read()
    failed = {}
    for key in (key for key in units if key not in readings):
        names = " and ".join(found.items[place].name for place in units[key])
        failed[names] = reasons.get(key, "not scored")
    both = [_both([readings.get(key) for key in pair]) for pair in keys]
    return Scored(argument, described, mark, scope, both, failed, len(units) - len(left), len(left))


def _both(found: Sequence[list[Reading] | None]) -> tuple[Reading, Reading] | None:
    if None in found:
        return None
    first, second = (reading for readings in found for reading in readings)
    return first, second


def pair_keys(found: Benchmark, contents: Sequence[str], scope: str) -> list[list[str]]:
    """Of each pair what its scores are kept by: one key for each clip, or one for both."""
    items = zip(contents, found.items, strict=True)
    identities = [[content, item.prompt, item.fps, dict(item.meta)] for content, item in items]
    if scope == "clip":
        keys = [fingerprint(identity) for identity in identities]
        return [[keys[pair.a], keys[pair.b]] for pair in found.pairs]
    return [[fingerprint([identities[pair.a], identities[pair.b]])] for pair in found.pairs]


def _units(found: Benchmark, keys: Sequence[Sequence[str]]) -> dict[str, Unit]:
    """Key -> the clips that are scored together."""
    units: dict[str, Unit] = {}
    for pair, names in zip(found.pairs, keys, strict=True):
        places = [(pair.a,), (pair.b,)] if len(names) == 2 else [(pair.a, pair.b)]
        for key, unit in zip(names, places, strict=True):
            units.setdefault(key, unit)
    return units


def _written(answered: Iterator[tuple[str, Answer]], write: Callable[..., None], allowed: float) -> None:
    failures = 0
    for key, answer in answered:
        if isinstance(answer, str):
            write(key, error=answer)
            failures += 1
            if failures > allowed:
                raise TrainingStopped(
                    f"{failures} could not be scored, more than --max-failed allows; the last: {answer}"
                )
        else:
            write(key, readings=answer)


def _shown(answered: Iterator[tuple[str, Answer]], total: int, title: str | None, console: Console) -> Iterator:
    """Pass answers on behind a bar, on a terminal."""
    columns = (TextColumn(title or ""), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not (title and console.is_terminal)) as bar:
        yield from bar.track(answered, total=total)


def _answered(
    name: str, reward: Reward, found: Benchmark, units: Mapping[str, Unit], batch: int
) -> Iterator[tuple[str, Answer]]:
    """Key after key what the reward says; while it is asked the next media are read."""
    size = 1 if reward.scope == "batch" else batch  # such a reward would compare the pairs with one another
    keys = list(units)

    def read(call: Sequence[str]) -> list[tuple[str, list[Clip] | RewardError]]:
        clips = []
        for group, key in enumerate(call):
            try:
                clips.append((key, [_clip(found, place, group) for place in units[key]]))
            except RewardError as error:
                clips.append((key, error))
        return clips

    for clips in ahead(read, [keys[start : start + size] for start in range(0, len(keys), size)]):
        yield from _answers(name, reward, clips).items()


def _clip(found: Benchmark, place: int, group: int) -> Clip:
    item = found.items[place]
    frames, rate = read_video(item.path, item.fps)
    return Clip(frames, item.prompt, rate, group, item.meta)


def _answers(name: str, reward: Reward, clips: Sequence[tuple[str, list[Clip] | RewardError]]) -> dict[str, Answer]:
    """Key -> readings, or why there are none; after a failure each is asked alone."""
    answers: dict[str, Answer] = {key: str(clip) for key, clip in clips if isinstance(clip, RewardError)}
    good = [(key, clip) for key, clip in clips if not isinstance(clip, RewardError)]
    if not good:
        return answers
    rows = iter(ask({name: reward}, [clip for _, unit in good for clip in unit]))
    for key, unit in good:
        answers[key] = _readings(name, [next(rows) for _ in unit])
    if len(good) > 1:
        for one in good:
            if isinstance(answers[one[0]], str):
                answers |= _answers(name, reward, [one])
    return answers


def _readings(name: str, rows: Sequence[Mapping[str, Any]]) -> Answer:
    if errors := [row["error"] for row in rows if row["error"]]:
        return "; ".join(dict.fromkeys(errors))
    if not all(row[f"{name}:valid"] for row in rows):
        return "the reward has no score for it"
    dims = {column.removeprefix(f"{name}/"): column for column in rows[0] if column.startswith(f"{name}/")}
    columns = {"total": name, **dims}
    return [{n: math.nan if row[c] is None else row[c] for n, c in columns.items()} for row in rows]
