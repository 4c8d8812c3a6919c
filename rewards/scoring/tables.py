"""What `python -m rewards.score` is asked to score: videos with their prompts, from a file, a folder or a table.

Everything that is wrong is collected, so that a user mends a table once.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rewards.contract import RewardError
from rewards.video_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES

TABLES = (".csv", ".jsonl")
LABELS = ("VQ", "MQ", "TA", "Overall")  # of VideoAlign's pairs: which of two videos people like better
CHOICES = ("A", "B", "same")


class Video(NamedTuple):
    """One video to be scored."""

    name: str  # as the table has it, normalised; else relative to the folder of --videos
    path: Path
    prompt: str
    fps: float | None = None  # None: the file says
    meta: Mapping[str, Any] = {}  # the table's other columns; rewards see them as Clip.meta


class Pair(NamedTuple):
    """Two videos, by their places in `Inputs.videos`, and what people said of them."""

    first: int
    second: int
    labels: Mapping[str, str]  # VQ, MQ, TA, Overall -> A, B, same


@dataclass
class Inputs:
    videos: list[Video] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # one line each
    seen: dict[str, tuple[int, str]] = field(default_factory=dict)  # absolute path -> place in videos, first mention


class Line(NamedTuple):
    """One row of a table and its place in it."""

    where: str
    values: dict[str, Any]

    def text(self, column: str) -> str | None:
        value = self.values.get(column)
        return (value.strip() or None) if isinstance(value, str) else None


def read_inputs(videos: str | Path, prompts: str | None = None, names_are_prompts: bool = False) -> Inputs:
    """Find the videos and the prompt of each; what is wrong stands in `problems`.

    Args:
        videos: a video or image, a folder of them, or a table (.csv, .jsonl) with the columns `path` or `path_A` and
            `path_B` (pairs), `prompt`, and if need be `fps` (`fps_A`, `fps_B`). Paths are relative to the table.
        prompts: one prompt for all, or a file: a table with `path` and `prompt`, or a .txt with a line a video, in
            natural order of the names (2 before 10). Without it, a table's own column or a .txt beside each video.
        names_are_prompts: a video without a prompt is described by its file's name, with _ for spaces.
    """
    source, inputs = Path(videos), Inputs()
    known = (*TABLES, *VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
    try:
        if not os.path.exists(source):
            raise RewardError(f"--videos: no such file or folder: {source}")
        if source.is_file() and source.suffix.lower() not in known:
            raise RewardError(f"--videos: {source} is neither a folder nor one of {', '.join(known)}")
        if source.suffix.lower() in TABLES:
            _from_table(source, prompts, inputs)
        else:
            _from_files(source, prompts, names_are_prompts, inputs)
        if not inputs.videos and not inputs.problems:
            raise RewardError(f"--videos: no video in {source}")
    except RewardError as error:
        inputs.problems.append(str(error))
    for video in inputs.videos:
        for what, text in (("name", video.name), ("prompt", video.prompt)):
            if not _is_text(text):  # no row could be written for it
                inputs.problems.append(f"--videos: the {what} {text!r} is not Unicode text; change it")
    return inputs


def _from_table(table: Path, prompts: str | None, inputs: Inputs) -> None:
    lines = _lines_of(table, inputs)
    columns = {column for line in lines for column in line.values}
    if prompts is not None and _is_file_name(prompts):
        raise RewardError(f"--prompts: {prompts}: beside a table, give one prompt for all, or a column prompt in it")
    if lines and (prompts is None) != ("prompt" in columns):
        missing = prompts is None
        raise RewardError(
            f"--videos: {table} has no column prompt; add it, or give one --prompts for all"
            if missing
            else f"--prompts: {table} has prompts of its own; leave --prompts away"
        )
    if lines and not columns & {"path", "path_A", "path_B"}:
        raise RewardError(f"--videos: {table} has no column path (nor path_A and path_B)")
    for line in lines:
        endings = ("_A", "_B") if {"path_A", "path_B"} & line.values.keys() else ("",)
        found = [_from_line(line, ending, table.parent, prompts, inputs) for ending in endings]
        if len(found) == 2:
            labels = {name: label for name in LABELS if (label := line.text(name))}
            inputs.problems += [
                f"{line.where}: {name} is {label!r}, expected one of {', '.join(CHOICES)}"
                for name, label in labels.items()
                if label not in CHOICES
            ]
            if None not in found:
                inputs.pairs.append(Pair(*found, labels))


def _from_line(line: Line, ending: str, folder: Path, prompts: str | None, inputs: Inputs) -> int | None:
    """Add the video that a row names, unless it is there already: its place, None where the row is wrong."""
    problems = []
    name, prompt = line.text(f"path{ending}"), line.text("prompt") if prompts is None else prompts
    path = folder / os.path.expanduser(name or "")
    fps, rate = _rate(line.values.get(f"fps{ending}"))
    if not name:
        problems.append(f'no "path{ending}"')
    elif not os.path.isfile(path):  # unlike Path.is_file, also says so of a name that is too long
        problems.append(f"no such file: {path}")
    if not prompt:
        problems.append('no "prompt"')
    if rate:
        problems.append(f"fps{ending} is {rate!r}, expected a positive number or nothing")
    inputs.problems += [f"{line.where}: {problem}" for problem in problems]
    if problems:
        return None
    meta = {} if ending else {key: value for key, value in line.values.items() if key not in ("path", "prompt", "fps")}
    video = Video(Path(os.path.normpath(name)).as_posix(), path, prompt, fps, meta)
    place, first = inputs.seen.setdefault(os.path.abspath(path), (len(inputs.videos), line.where))
    if place == len(inputs.videos):
        inputs.videos.append(video)
    for what in ("prompt", "fps"):
        before, now = getattr(inputs.videos[place], what), getattr(video, what)
        if before != now:
            inputs.problems.append(f"{line.where}: {video.name} has {what} {now!r} here and {before!r} at {first}")
    return place


def _is_text(text: str) -> bool:
    """Whether it holds no halves of characters, as JSON and file names in other encodings may."""
    try:
        return bool(text.encode()) or not text
    except UnicodeEncodeError:
        return False


def _rate(value: Any) -> tuple[float | None, Any]:
    """Frames a second where a cell says so, and the cell where it says nonsense."""
    if value is None or value == "":
        return None, None
    try:
        fps = float(value)
    except (TypeError, ValueError):
        return None, value
    return (fps, None) if math.isfinite(fps) and fps > 0 else (None, value)


def _from_files(source: Path, prompts: str | None, names_are_prompts: bool, inputs: Inputs) -> None:
    files = [source] if source.is_file() else _videos_in(source)
    found = _prompts_of(files, prompts, inputs)
    if names_are_prompts:
        found = {file: found.get(file) or file.stem.replace("_", " ") for file in files}
    without = [file.name for file in files if not found.get(file, "").strip()]
    if without and not inputs.problems:
        listed = ", ".join(without[:3]) + (f" and {len(without) - 3} more" if len(without) > 3 else "")
        ways = "--prompts, or NAME.txt beside NAME.mp4, or --prompts-from-names"
        inputs.problems.append(f"--videos: no prompt for {listed}; give {ways}")
    inputs.videos += [Video(file.name, file, found.get(file, "").strip()) for file in files]


def _videos_in(folder: Path) -> list[Path]:
    """The folder's own videos and images, in natural order."""
    known = (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES)
    return sorted((p for p in folder.iterdir() if p.is_file() and p.suffix.lower() in known), key=natural_order)


def natural_order(path: Path) -> list[tuple[int, str]]:
    """Sorts clip_2 before clip_10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def _prompts_of(files: list[Path], prompts: str | None, inputs: Inputs) -> dict[Path, str]:
    if prompts is None:
        beside = {file: file.with_suffix(".txt") for file in files}
        return {file: _text(text).strip() for file, text in beside.items() if text.is_file()}
    if not _is_file_name(prompts):
        return dict.fromkeys(files, prompts)
    source = Path(prompts)
    if not os.path.isfile(source):
        raise RewardError(f"--prompts: no such file: {source}")
    if source.suffix.lower() in TABLES:
        return _prompts_by_path(source, files, inputs)
    lines = [line for line in _text(source).split("\n") if line.strip()]
    if len(lines) != len(files):
        raise RewardError(f"--prompts: {source} has {len(lines)} lines for {len(files)} videos")
    return dict(zip(files, lines, strict=True))


def _prompts_by_path(table: Path, files: list[Path], inputs: Inputs) -> dict[Path, str]:
    """Rows may name more videos than are here; their paths are relative to the videos' folder or to the table."""
    wanted, found = {os.path.abspath(file): file for file in files}, {}
    bases = {*(file.parent for file in files), table.parent}
    for line in _lines_of(table, inputs):
        name, prompt = line.text("path"), line.text("prompt")
        if not name or not prompt:
            inputs.problems.append(f'{line.where}: no "path" or no "prompt"')
            continue
        for file in {wanted.get(os.path.abspath(base / os.path.expanduser(name))) for base in bases} - {None}:
            if found.setdefault(file, prompt) != prompt:
                inputs.problems.append(f"{line.where}: {name} has prompt {prompt!r} here and {found[file]!r} before")
    return found


def _is_file_name(prompts: str) -> bool:
    return Path(prompts).suffix.lower() in (".txt", *TABLES)


def _lines_of(table: Path, inputs: Inputs) -> list[Line]:
    """The rows of a .csv or .jsonl file that can be read. Raises: RewardError where none can."""
    text, lines = _text(table), []
    if table.suffix.lower() == ".csv":
        rows = csv.DictReader(io.StringIO(text, newline=""))
        try:
            for row in rows:
                where = f"{table} line {rows.line_num}"
                if None in row:  # or a prompt would lose what follows its first comma
                    inputs.problems.append(f"{where}: more cells than columns; a cell with a comma needs quotes")
                else:
                    lines.append(Line(where, row))
        except csv.Error as error:
            raise RewardError(f"{table} line {rows.line_num}: {error}") from error
        return lines
    for number, line in enumerate(text.split("\n"), 1):  # JSON allows other line separators inside a string
        where = f"{table} line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            inputs.problems.append(f"{where}: not JSON: {error}")
            continue
        if isinstance(row, dict):
            lines.append(Line(where, row))
        elif line.strip():
            inputs.problems.append(f"{where}: not a JSON object")
    return lines


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # spreadsheets put a mark in front
    except UnicodeDecodeError as error:
        raise RewardError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise RewardError(f"{path}: cannot be read: {error.strerror}") from error
