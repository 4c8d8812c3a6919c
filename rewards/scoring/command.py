"""The work of `python -m rewards.score`: check everything, score call after call, say what came out."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rewards.arguments import RewardArgument, parse_rewards
from rewards.contract import SCOPES, Clip, Reward, RewardError
from rewards.loading import check, load
from rewards.scoring.asking import RewardFailed, Row, ask, failed_row
from rewards.scoring.output import (
    append_to,
    check_output,
    fingerprint,
    is_complete,
    journal_of,
    key_of,
    read_rows,
    write_rows,
)
from rewards.scoring.summary import agreements, spreads
from rewards.scoring.tables import Inputs, Video, read_inputs
from rewards.video_files import MAX_PIXELS, read_video

SHOWN = 20  # problems listed; a table made for another folder has thousands
TAKEN = ("path", "prompt", "fps", "frames", "error", "key", "rewards")  # columns that are no reward's
Item, Result = TypeVar("Item"), TypeVar("Result")


class BadInput(ValueError):
    """All that is wrong with the command and its files, one line each."""

    def __init__(self, problems: Sequence[str]):
        more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
        self.problems = [*problems[:SHOWN], *more]
        super().__init__("\n".join(self.problems))


class Stopped(Exception):
    """A fault that the next video would meet, too. What was scored before is written."""


def score(options: argparse.Namespace) -> int:
    """Run the command. Returns: 0 where every video has every score, else 1. Raises: BadInput, Stopped."""
    asked, inputs = _checked(options)
    keys, spec = [key_of(video) for video in inputs.videos], fingerprint(asked, options.dense)
    journal = journal_of(options.out) if options.out else None
    console = Console(highlight=False, markup=False, soft_wrap=True)
    try:
        rows = read_rows(journal, spec, keys) if journal else {}
        left = {key for key in keys if key not in rows or not is_complete(rows[key])}
        rewards = load_all(asked) if left else {}
        calls = _calls(inputs.videos, [key in left for key in keys], rewards.values(), options.batch)
        for place in (place for call in calls for place in call):
            rows.pop(keys[place], None)
        if rows:
            console.print(f"{len(rows)} of {len(keys)} videos are scored already")
        with append_to(journal, rows.values()) as append:
            found = _scored(calls, inputs.videos, rewards, options)
            for place, row in _shown(found, sum(map(len, calls)), list(asked), options, console):
                rows[keys[place]] = row | {"key": keys[place], "rewards": spec}
                append(rows[keys[place]])
        ordered = [rows[key] for key in keys]
        if options.out and journal != options.out:
            write_rows(options.out, ordered)
    except RewardError as error:
        raise BadInput([str(error)]) from error
    except (RewardFailed, OSError) as error:
        raise Stopped(str(error)) from error
    return _summed_up(ordered, inputs, list(asked), options, console)


def _checked(options: argparse.Namespace) -> tuple[dict[str, RewardArgument], Inputs]:
    """Everything that can be known before weights are read. Raises: BadInput with all that is wrong."""
    inputs = read_inputs(options.videos, options.prompts, options.prompts_from_names)
    inputs.videos = [video._replace(fps=video.fps or options.fps) for video in inputs.videos]
    problems, asked = [], {}

    def attempt(action: Callable) -> None:
        try:
            action()
        except RewardError as error:
            problems.append(str(error))

    attempt(lambda: asked.update(parse_rewards(options.reward)))
    for name, argument in asked.items():
        if name in TAKEN:
            problems.append(f"--reward: {name} is a column of every table; call the reward something else: NAME=...")
        attempt(lambda argument=argument: check(argument.use, **argument.options))
    if options.out:
        attempt(lambda: check_output(options.out, options.dense))
    if problems or inputs.problems:
        raise BadInput([*problems, *inputs.problems])
    return asked, inputs


def load_all(asked: Mapping[str, RewardArgument]) -> dict[str, Reward]:
    """Build every reward. Raises: RewardError, and RewardFailed for what else a reward raises."""
    rewards = {}
    for name, argument in asked.items():
        try:
            rewards[name] = load(argument.use, **argument.options)
        except RewardError:
            raise
        except Exception as error:  # a user's class may raise anything
            raise RewardFailed(name, error) from error
    return rewards


def _calls(videos: Sequence[Video], left: Sequence[bool], rewards: Iterable[Reward], batch: int) -> list[list[int]]:
    """Which videos are scored together, by their places: as many as the reward with the widest scope has to see."""
    scope = max((reward.scope for reward in rewards), key=SCOPES.index, default="clip")
    if scope == "clip":
        places = [place for place in range(len(videos)) if left[place]]
        return [places[start : start + batch] for start in range(0, len(places), batch)]
    together = defaultdict(list)
    for place, video in enumerate(videos):
        together[video.prompt if scope == "group" else None].append(place)
    return [call for call in together.values() if any(left[place] for place in call)]


def _scored(
    calls: Sequence[Sequence[int]], videos: Sequence[Video], rewards: Mapping[str, Reward], options: argparse.Namespace
) -> Iterator[tuple[int, Row]]:
    """Read and score call after call: the place of each video, and its row."""
    group = {prompt: index for index, prompt in enumerate(dict.fromkeys(video.prompt for video in videos))}

    def read(call: Sequence[int]) -> dict[int, Clip | RewardError]:
        found = {}
        for place in call:
            name, path, prompt, fps, meta = videos[place]
            try:
                frames, rate = read_video(path, fps, options.max_pixels or MAX_PIXELS)
                found[place] = Clip(frames, prompt, rate, group[prompt], meta)
            except RewardError as error:
                found[place] = error
        return found

    for found in ahead(read, calls):
        clips = {place: clip for place, clip in found.items() if isinstance(clip, Clip)}
        rows = dict(zip(clips, ask(rewards, list(clips.values()), options.dense) if clips else [], strict=True))
        for place, clip in found.items():
            row = rows.get(place) or failed_row(list(rewards), str(clip))
            seen = {"fps": clip.fps, "frames": len(clip.video)} if place in rows else {"fps": None, "frames": None}
            yield place, {"path": videos[place].name, "prompt": videos[place].prompt, **seen, **row}


def ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """The results for item after item; while one is used, the next one is made."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        waiting = None
        for item in items:
            following = worker.submit(function, item)
            if waiting:
                yield waiting.result()
            waiting = following
        if waiting:
            yield waiting.result()


def _shown(
    found: Iterator[tuple[int, Row]], total: int, names: Sequence[str], options: argparse.Namespace, console: Console
) -> Iterator[tuple[int, Row]]:
    """Pass rows on, and show a bar on a terminal, or a line a video where there is none or no file is written."""
    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    bar_only = console.is_terminal and options.out is not None
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        for number, (place, row) in enumerate(found, 1):
            bar.update(task, advance=1, description=row["path"])
            if row["error"] or not bar_only:
                console.print(f"[{number}/{total}] {row['path']}  {_in_words(row, names, options.out is None)}")
            yield place, row


def _in_words(row: Row, names: Sequence[str], dims: bool) -> str:
    columns = [c for c in row if c in names or (dims and "/" in c and c.partition("/")[0] in names)]
    numbers = [f"{column} {row[column]:.4f}" for column in columns if row[column] is not None]
    failed = [f"{name} has no score" for name in names if not row[f"{name}:valid"]]
    return "  ".join([*numbers, *([row["error"]] if row["error"] else failed)])


def _summed_up(rows: Sequence[Row], inputs: Inputs, names: Sequence[str], options: argparse.Namespace, console) -> int:
    if len(rows) > 1:
        table = Table("reward", "valid", "mean", "std", "min", "max")
        for spread in spreads(rows, names):
            table.add_row(spread.column, str(spread.valid), *(f"{value:.4f}" for value in spread[2:]))
        console.print(table)
    agreeing = agreements(rows, inputs.pairs, names)
    if agreeing:
        table = Table("reward", "people's label", "agreement", "pairs")
        for found in agreeing:
            table.add_row(found.column, found.label, f"{found.share:.3f}", str(found.pairs))
        console.print(table)
    failed = sum(not is_complete(row) for row in rows)
    where = f", in {options.out}" if options.out else ""
    console.print(f"{len(rows) - failed} of {len(rows)} videos have every score{where}")
    return 1 if failed else 0
