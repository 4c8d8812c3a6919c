"""Preferences from files: our JSON lines, VideoAlign's table of pairs, a folder of videos with a file of prompts.

All that is wrong with a file is found before anything is raised, so that it is mended in one go.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

from rewards.scoring.tables import natural_order
from rewards.video_files import VIDEO_SUFFIXES

from ..errors import Problems, UserError, one_line
from .preference_json import parse_record
from .preferences import Group, Pair

CHOICES = {"A": 1, "B": -1, "same": 0}  # of VideoAlign's table: who is better
NEEDED = ("path_A", "path_B", "prompt")
LABELS = ("VQ", "MQ", "TA", "Overall")  # visual quality, motion quality, text alignment, and all in all
NUMBERS = ("fps_A", "fps_B", "num_frames_A", "num_frames_B")
PROMPT_FILES = ("prompts.txt", "prompts.csv", "prompts.jsonl")


class Row(NamedTuple):
    line: int  # the last one, of a row over several
    values: Any  # an object, unless a line of JSON holds something else


class Problem(NamedTuple):
    line: int  # 0: of the file as a whole
    what: str


def read_preferences(
    path: str | Path, key: str = "data.preferences", prompts: str | Path | None = None
) -> list[Pair | Group]:
    """Read pairs and groups, in the order of the file.

    Args:
        path: .jsonl as preference_json describes it; .csv with VideoAlign's columns path_A, path_B, prompt and, if need
            be, VQ, MQ, TA (the labels by dimension: A, B or same), Overall (the label), fps_A, fps_B, num_frames_A,
            num_frames_B (kept where A and B share them); or a folder of videos, see `read_videos`.
        key: of the recipe, or what else named the file.
        prompts: of a folder; None: the file in it that is called prompts.txt, prompts.csv or prompts.jsonl.
    Raises: UserError that names the key and the file; Problems, one line for each fault, with its line of the file.
    """
    path = Path(path).expanduser()
    if path.is_dir():
        return read_videos(path, prompts or _prompts_in(path, key), key)
    problems: list[Problem] = []
    rows = _rows(path, key, (".jsonl", ".csv"), problems)
    if path.suffix == ".csv":
        rows = _from_video_align(rows, path.stem, problems)
    return _records(rows, path, path.parent, key, problems)


def read_videos(folder: str | Path, prompts: str | Path, key: str = "data.preferences") -> list[Group]:
    """The videos of a folder, each a group of its own without scores: what there is to imitate.

    Args:
        folder: its own videos count, not those in folders within.
        prompts: one for each video. A .txt has them line by line, in natural order of the videos' names (2 before 10).
            A .csv or .jsonl has the columns "video" (or "path"), a file of the folder, and "prompt", and if need be
            "image", a file from the table's folder; further columns are the prompts' meta.
    Returns: in the order of the prompts.
    Raises: as `read_preferences` does.
    """
    folder, prompts = Path(folder).expanduser(), Path(prompts).expanduser()
    if not folder.is_dir():
        raise UserError(f"{key}: no such folder: {folder}")
    files = [file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in VIDEO_SUFFIXES]
    videos = [file.name for file in sorted(files, key=natural_order)]
    if not videos:
        raise UserError(f"{key}: no video in {folder}; a video is one of {', '.join(VIDEO_SUFFIXES)}")
    problems: list[Problem] = []
    rows = _rows(prompts, key, (".txt", ".csv", ".jsonl"), problems)
    if prompts.suffix == ".txt":
        if len(rows) != len(videos):
            problems.append(
                Problem(0, f"{len(rows)} prompts for the {len(videos)} videos in {folder}; give one for each")
            )
            return _records([], prompts, folder, key, problems)
        rows = [Row(row.line, row.values | {"video": name}) for row, name in zip(rows, videos, strict=True)]
    rows = _as_groups(rows, prompts.parent.absolute(), problems)
    named = {row.values["id"] for row in rows if isinstance(row.values, dict)}
    problems += [
        Problem(0, f"no prompt for {name}; add it, or move the video away") for name in videos if name not in named
    ]
    return _records(rows, prompts, folder, key, problems)


def _prompts_in(folder: Path, key: str) -> Path:
    found = [folder / name for name in PROMPT_FILES if (folder / name).is_file()]
    if len(found) != 1:
        raise UserError(
            f"{key}: {folder}: a folder of videos needs one of {', '.join(PROMPT_FILES)}; it has {len(found)}"
        )
    return found[0]


def _records(rows: Iterable[Row], file: Path, folder: Path, key: str, problems: list[Problem]) -> list[Pair | Group]:
    """What the rows, objects of our form, hold."""
    records, first = [], {}
    for line, values in rows:
        record, wrong = parse_record(values, folder, line)
        records.append(record)
        problems += [Problem(line, what) for what in wrong]
        name = values.get("id") if isinstance(values, dict) else None
        if isinstance(name, str) and first.setdefault(name, line) != line:
            problems.append(Problem(line, f'the id "{name}" is that of line {first[name]}, too; give each its own'))
    if problems:
        places = {line: f"{key}: {file} line {line}" if line else f"{key}: {file}" for line, _ in problems}
        raise Problems([f"{places[line]}: {what}" for line, what in sorted(problems, key=lambda p: p.line)])
    if not records:
        raise UserError(f"{key}: {file} is empty; it should hold pairs or groups")
    return records


def _rows(file: Path, key: str, suffixes: tuple[str, ...], problems: list[Problem]) -> list[Row]:
    if not file.is_file():
        raise UserError(f"{key}: no such file: {file}")
    if file.suffix not in suffixes:
        raise UserError(f"{key}: {file}: unknown format {file.suffix!r}; use {', '.join(suffixes)}")
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")  # a mark that spreadsheets and Windows put in front
    except OSError as error:
        raise UserError(f"{key}: {file}: cannot be read: {error.strerror}") from error
    if file.suffix == ".csv":
        return _csv_rows(content, problems)
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):  # JSON allows other line separators inside a string
        try:
            text = line.decode().strip()
            if text:
                rows.append(Row(number, json.loads(text) if file.suffix == ".jsonl" else {"prompt": text}))
        except UnicodeDecodeError as error:
            problems.append(Problem(number, _not_utf8(error)))
        except (ValueError, RecursionError) as error:
            reason = (
                f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else one_line(error)
            )
            problems.append(Problem(number, f"not JSON: {reason}; write one object a line"))
    return rows


def _csv_rows(content: bytes, problems: list[Problem]) -> list[Row]:
    """Rows without their empty cells; all cells are text without spaces around it."""
    try:
        table = csv.DictReader(io.StringIO(content.decode(), newline=""))
    except UnicodeDecodeError as error:
        problems.append(Problem(content.count(b"\n", 0, error.start) + 1, _not_utf8(error)))
        return []
    rows = []
    try:
        for row in table:
            if None in row:  # or a prompt would lose what follows its first comma
                problems.append(Problem(table.line_num, "more cells than columns; a cell with a comma needs quotes"))
            else:
                cells = {column: cell.strip() for column, cell in row.items() if cell and cell.strip()}
                rows.append(Row(table.line_num, cells))
    except csv.Error as error:
        problems.append(Problem(table.reader.line_num, f"{error}; what follows was not read"))
    return rows


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8 text ({error.reason}: byte {error.object[error.start]:#04x}); save the file as UTF-8"


def _from_video_align(rows: list[Row], name: str, problems: list[Problem]) -> list[Row]:
    """Our form of its rows."""
    columns = {column for row in rows for column in row.values}
    missing = [column for column in NEEDED if rows and column not in columns]
    problems += [Problem(1, f'no column "{column}"; a table of pairs has {", ".join(NEEDED)}') for column in missing]
    for column in columns.difference(NEEDED, LABELS, NUMBERS):  # others may be there, but no slips of the pen
        lacking = {known.lower(): known for known in (*NEEDED, *LABELS, *NUMBERS) if known not in columns}
        if near := get_close_matches(column.lower(), lacking, 1, cutoff=0.8):
            problems.append(Problem(1, f'unknown column "{column}"; did you mean "{lacking[near[0]]}"?'))
    if missing:
        return []
    return [Row(row.line, _pair_of_cells(row, f"{name}:{row.line}", problems)) for row in rows]


def _pair_of_cells(row: Row, name: str, problems: list[Problem]) -> dict[str, Any]:
    cells = row.values
    choices = {column: cells[column] for column in LABELS if column in cells}
    problems += [
        Problem(row.line, f'"{column}" is {choice!r}; it should be one of {", ".join(CHOICES)}, or empty')
        for column, choice in choices.items()
        if choice not in CHOICES
    ]
    labels = {column: CHOICES.get(choice) for column, choice in choices.items()}
    numbers = {column: _number(row, column, problems) for column in NUMBERS}
    fps = {numbers["fps_A"], numbers["fps_B"]}
    frames = {numbers["num_frames_A"], numbers["num_frames_B"]}
    found = {
        "id": name,
        "prompt": cells.get("prompt"),
        "a": {"video": cells.get("path_A")},
        "b": {"video": cells.get("path_B")},
        "label": labels.pop("Overall", None),
        "labels": {column: label for column, label in labels.items() if label is not None},
    }
    if len(fps) == 1:
        found["fps"] = fps.pop()
    if len(frames) == 1 and None not in frames:
        found["frames"] = int(frames.pop())
    return found


def _number(row: Row, column: str, problems: list[Problem]) -> float | None:
    cell = row.values.get(column)
    if cell is None:
        return None
    whole = column.startswith("num_frames")
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if math.isfinite(number) and number > 0 and not (whole and number % 1):
        return number
    kind = "whole number" if whole else "number"
    problems.append(Problem(row.line, f'"{column}" is {cell!r}; it should be a {kind} above 0, or empty'))
    return None


def _as_groups(rows: list[Row], folder: Path, problems: list[Problem]) -> list[Row]:
    """Our form of rows that describe one video each; images are named from the folder."""
    groups = []
    for row in rows:
        if not isinstance(row.values, dict):
            groups.append(row)
            continue
        meta = dict(row.values)
        paths = [path for column in ("video", "path") if (path := meta.pop(column, None))]
        if not paths or not isinstance(paths[0], str):
            problems.append(Problem(row.line, 'no "video"; give the name of a file'))
            continue
        name = os.path.normpath(paths[0])
        found = {"id": name, "prompt": meta.pop("prompt", None), "members": [{"video": name}]}
        if image := meta.pop("image", None):
            found["image"] = str(folder / os.path.expanduser(image)) if isinstance(image, str) else image
        groups.append(Row(row.line, {**found, "meta": meta}))
    return groups
