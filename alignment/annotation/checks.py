"""What can be known before rewards are loaded, and all that is wrong said at once."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from rewards.arguments import RewardArgument, parse_rewards
from rewards.contract import RewardError
from rewards.loading import check
from rewards.scoring.output import check_output, fingerprint
from rewards.video_files import read_video

from ..data import Group, Pair, check_media, num_segments, read_preferences
from ..errors import Problems, UserError
from .journal import Journal, read_journal
from .labels import BTT_BAND, MEAN, Rule
from .questions import videos_of

Lengths = dict[tuple[Path, float | None], tuple[int, float]]  # file and rate to believe -> frames, and rate


class Task(NamedTuple):
    """What is to be done."""

    asked: dict[str, RewardArgument]
    rule: Rule
    records: list[Pair | Group]  # of two videos or more
    lengths: Lengths  # of the videos, where they are cut into segments
    journal: Journal
    where: str  # the records come from

    def length_of(self, record: Pair | Group) -> tuple[int, float] | None:
        """Frames and rate of its videos."""
        video = videos_of(record)[0]
        return self.lengths.get((video.path, video.fps))


def checked(options: argparse.Namespace) -> Task:
    """Raises: Problems, or the UserError of an output that is something else's."""
    problems: list[str] = []
    asked: dict[str, RewardArgument] = {}
    records: list[Pair | Group] = []
    lengths: Lengths = {}
    index = options.index.expanduser().absolute()  # so that the output can name files from its own folder
    where = f"INDEX: {index}"

    def attempt(action: Callable[[], object]) -> None:
        try:
            action()
        except Problems as error:
            problems.extend(error.lines)
        except (UserError, RewardError) as error:
            problems.append(str(error))

    attempt(lambda: asked.update(parse_rewards(options.reward)))
    for argument in asked.values():
        attempt(lambda argument=argument: check(argument.use, **argument.options))
    problems += _option_problems(options, asked)
    attempt(lambda: check_output(options.out, dense=False))
    attempt(lambda: records.extend(read_preferences(index, "INDEX")))
    problems += [
        f"{where} line {record.line}: {record.id} has a latent without its video, which rewards look at"
        for record in records
        if not all(member.video for member in record.members)
    ]
    if records and all(len(record.members) < 2 for record in records):
        problems.append(f"{where}: every group has one video, and nothing to compare it with")
    attempt(lambda: check_media(records, where))
    if options.segments and not problems:
        attempt(lambda: lengths.update(_lengths(records, options.segments, where)))
    if problems:
        raise Problems(problems)
    tie_eps = BTT_BAND if options.btt else options.tie_eps
    rule = Rule(tuple(asked), options.score, tie_eps, options.select, options.tolerance, options.emphasis)
    compared = [record for record in records if len(record.members) > 1]
    return Task(asked, rule, compared, lengths, read_journal(options.out, fingerprint(asked, dense=False)), where)


def _option_problems(options: argparse.Namespace, asked: dict[str, RewardArgument]) -> list[str]:
    problems = [
        f"--reward: the name {name} says something else in the output; give another: NAME=..."
        for name in asked
        if name == MEAN or name.lower().startswith("human")
    ]
    if options.out.suffix != ".jsonl":
        problems.append(f"--out: {options.out} should be a .jsonl file")
    if not 0 <= options.tie_eps < math.inf:
        problems.append(f"--tie-eps: {options.tie_eps} is not 0 or more, and finite")
    for option in ("score", "emphasis"):
        value = getattr(options, option)
        if asked and value not in (None, MEAN) and value.partition("/")[0] not in asked:
            problems.append(f"--{option}: {value} is not of a reward ({', '.join(asked)}); give NAME or NAME/DIMENSION")
    if options.select == "pareto":
        if options.score == MEAN or options.tolerance is None:
            problems.append(
                "--select pareto: needs --score NAME, which is to differ, and --tolerance, by which others may"
            )
        if options.btt or options.tie_eps:
            problems.append("--select pareto: has a --tolerance; leave --tie-eps and --btt away")
    elif options.tolerance is not None or options.emphasis is not None:
        problems.append("--tolerance, --emphasis: are for --select pareto")
    normed = [each.name for each in asked.values() if each.use == "video_reward" and each.options.get("use_norm", True)]
    if options.btt and normed:
        problems.append(f"--btt: its band is one of raw scores; give {normed[0]} the option use_norm=false")
    return problems


def _lengths(records: list[Pair | Group], seconds: float, where: str) -> Lengths:
    """Frames and rate of every video, each read once. Raises: Problems where segments do not fit."""
    first: dict[tuple[Path, float | None], Pair | Group] = {}
    for record in records:
        for video in videos_of(record):
            first.setdefault((video.path, video.fps), record)

    def measured(file: tuple[Path, float | None]) -> tuple[int, float] | str:
        try:
            frames, fps = read_video(*file)
            num_segments(len(frames), fps, seconds)
        except RewardError as error:
            return str(error)
        except ValueError as error:
            return f"--segments: {file[0]}: {error}"
        return len(frames), fps

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the work is ffmpeg's
        found = dict(zip(first, pool.map(measured, first), strict=True))
    problems = [(first[file].line, clip) for file, clip in found.items() if isinstance(clip, str)]
    for record in records:
        clips = {clip for v in videos_of(record) if not isinstance(clip := found[v.path, v.fps], str)}
        shown = " and ".join(f"{frames} frames at {fps:g} fps" for frames, fps in sorted(clips))
        if len(clips) > 1:
            problems.append((record.line, f"--segments: {record.id} has videos of {shown}; they have to be alike"))
        elif clips and isinstance(record, Pair) and record.frames not in (None, *(frames for frames, _ in clips)):
            problems.append((record.line, f'{record.id} has videos of {shown}, but "frames" says {record.frames}'))
    if problems:
        raise Problems([f"{where} line {line}: {what}" for line, what in sorted(problems)])
    return found
