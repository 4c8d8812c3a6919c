"""Preferences as JSON: pairs and groups of videos, read strictly and written back.

One JSON object a line. A pair has the two members `a` and `b`, a group has a list `members`:

    {"id": "17", "prompt": "a red kite", "a": {"video": "17/0.mp4", "seed": 3}, "b": {"latent": "17/1.safetensors"},
     "label": 1, "scores": {"VQ": [0.4, -1.2]}, "annotator": "video_reward"}
    {"id": "18", "prompt": "a blue kite", "members": [{"video": "18/0.mp4"}, {"video": "18/1.mp4"}],
     "scores": {"VQ": [0.1, null]}}

Files are named from the folder that the object's file is in. What else there may be: `image` (file of the first frame)
and `meta` (an object, for rewards) of the prompt; `source`; and of a pair `labels` (by dimension), `fps`, `frames`,
`seg_sec` and `seg_labels` (a label for each segment), `eta`, `annotator`, `order_consistent`.
"""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rewards.video_files import IMAGE_SUFFIXES, VIDEO_SUFFIXES

from .preferences import Group, Member, Pair, judged_by_people, score_of
from .prompts import Prompt, check_image
from .segments import num_segments


def parse_record(row: Any, folder: Path, line: int) -> tuple[Pair | Group | None, list[str]]:
    """A pair or a group from a JSON object.

    Refused are unknown keys, values of the wrong type (a number in quotes is text), numbers that are not finite, files
    that are missing or no images, the same file twice, segment labels that do not fit the clip, and labels against the
    sign of the score that decides (the one that the annotator is named after, if there is one, or the mean of all;
    `labels`: that of the dimension) where a reward gave both. An annotator that begins with "human", or none, may
    differ from the scores; and a tie may have any, since judges have tie bands.

    Args:
        row: what the line held.
        folder: that names of files begin at.
        line: where it stood.
    Returns: the record, None where anything is wrong; and all that is.
    """
    if not isinstance(row, dict):
        return None, ["no JSON object; write {...} on a line of its own"]
    problems: list[str] = []
    record = (_group if "members" in row else _pair)(row, folder, line, problems)
    if not problems and isinstance(record, Pair):
        problems = [*_segment_problems(record), *_label_problems(record)]
    return (None if problems else record), problems


def to_json(record: Pair | Group, folder: Path) -> dict[str, Any]:
    """The JSON object that `parse_record` makes this record from; files outside of the folder keep their whole path."""
    prompt = record.prompt
    row: dict[str, Any] = {"id": record.id, "prompt": prompt.text}
    row["image"] = prompt.image and _name(Path(prompt.image), folder)
    row["meta"] = {key: value for key, value in prompt.meta.items() if key != "image" or prompt.image is None}
    scores = {name: list(values) for name, values in record.scores.items()}
    if isinstance(record, Group):
        row |= {"members": [_member_json(member, folder) for member in record.members], "scores": scores}
    else:
        row |= {"a": _member_json(record.a, folder), "b": _member_json(record.b, folder), "label": record.label}
        row |= {"scores": scores, "labels": dict(record.labels), "seg_sec": record.segment_seconds}
        row |= {name: getattr(record, name) for name in ("fps", "frames", "eta", "annotator", "order_consistent")}
        row["seg_labels"] = record.segment_labels and list(record.segment_labels)
    row["source"] = record.source
    return {key: value for key, value in row.items() if value is not None and value != {}}


def _member_json(member: Member, folder: Path) -> dict[str, Any]:
    files = {kind: _name(path, folder) for kind in ("video", "latent") if (path := getattr(member, kind))}
    return files if member.seed is None else {**files, "seed": member.seed}


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path.absolute())


class _Kind(NamedTuple):
    words: str
    holds: Callable[[Any], bool]


def _is_text(value: Any) -> bool:
    """JSON may hold halves of characters, which nothing can be written with."""
    return isinstance(value, str) and bool(value.strip()) and bool(value.encode(errors="ignore").decode() == value)


def _is_number(value: Any) -> bool:
    """NaN, infinities and whole numbers too large for a float are none; nor is True, an int to Python."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


TEXT = _Kind("text", _is_text)
NUMBER = _Kind("a finite number, without quotes", _is_number)
POSITIVE = _Kind("a finite number above 0", lambda value: _is_number(value) and value > 0)
SHARE = _Kind("a number above 0, at most 1", lambda value: _is_number(value) and 0 < value <= 1)
WHOLE = _Kind("a whole number", _is_whole)
COUNT = _Kind("a whole number of at least 1", lambda value: _is_whole(value) and 1 <= value < 2**31)
LABEL = _Kind("1 (a is better), -1 (b is) or 0 (a tie)", lambda value: _is_whole(value) and value in (1, -1, 0))
TRUTH = _Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = _Kind("an object {...}", lambda value: isinstance(value, dict))
LIST = _Kind("a list [...] with something in it", lambda value: isinstance(value, list) and bool(value))

SHARED_KEYS = ("id", "prompt", "image", "meta", "scores", "source")
GROUP_KEYS = (*SHARED_KEYS, "members")
PAIR_KEYS = (
    *(*SHARED_KEYS, "a", "b", "label", "labels", "fps", "frames", "seg_sec", "seg_labels", "eta", "annotator"),
    "order_consistent",
)


class _Fields:
    """The fields of one JSON object. What is wrong with them goes to `problems`, and reads as None; so does null."""

    def __init__(self, row: dict[str, Any], known: Iterable[str], problems: list[str], where: str = ""):
        self.row, self.problems, self.where = row, problems, where
        for key in row:
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, cutoff=0.5)
                hint = f'did you mean "{near[0]}"?' if near else f"known: {', '.join(known)}"
                problems.append(f'unknown key "{where}{key}"; {hint}')

    def take(self, name: str, kind: _Kind, required: bool = False) -> Any:
        value = self.row.get(name)
        if value is None:
            if required:
                self.problems.append(f'no "{self.where}{name}"; give {kind.words}')
            return None
        return self.check(name, value, kind)

    def check(self, name: str, value: Any, kind: _Kind) -> Any:
        if kind.holds(value):
            return value
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        self.problems.append(f'"{self.where}{name}" is {shown}; it should be {kind.words}')
        return None

    def list_of(self, name: str, kind: _Kind, count: int | None = None, gaps: bool = False) -> tuple:
        """The items of a list, where there may be gaps null for some."""
        items = self.take(name, LIST) or []
        if items and count not in (None, len(items)):
            self.problems.append(f'"{self.where}{name}" has {len(items)} values; it should have {count}, one a video')
        return tuple(
            None if item is None and gaps else self.check(f"{name}[{i}]", item, kind) for i, item in enumerate(items)
        )


def _pair(row: dict[str, Any], folder: Path, line: int, problems: list[str]) -> Pair:
    fields = _Fields(row, PAIR_KEYS, problems)
    labels = fields.take("labels", OBJECT) or {}
    by_dimension = _Fields(labels, labels, problems, "labels.")
    pair = Pair(
        id=fields.take("id", TEXT, required=True),
        prompt=_prompt(fields, folder),
        a=_member(fields.take("a", OBJECT, required=True), "a", folder, problems),
        b=_member(fields.take("b", OBJECT, required=True), "b", folder, problems),
        label=fields.take("label", LABEL),
        scores=_scores(fields, 2),
        labels={name: by_dimension.take(name, LABEL, required=True) for name in labels},
        fps=fields.take("fps", POSITIVE),
        frames=fields.take("frames", COUNT),
        segment_seconds=fields.take("seg_sec", POSITIVE),
        segment_labels=fields.list_of("seg_labels", LABEL) or None,
        eta=fields.take("eta", SHARE),
        source=fields.take("source", TEXT),
        annotator=fields.take("annotator", TEXT),
        order_consistent=fields.take("order_consistent", TRUTH),
        line=line,
    )
    problems += _same_files(pair.members, ("a", "b"))
    return pair


def _group(row: dict[str, Any], folder: Path, line: int, problems: list[str]) -> Group:
    fields = _Fields(row, GROUP_KEYS, problems)
    names = [f"members[{i}]" for i in range(len(row["members"]) if isinstance(row["members"], list) else 0)]
    found = fields.list_of("members", OBJECT)
    members = tuple(_member(item, name, folder, problems) for item, name in zip(found, names, strict=True))
    problems += _same_files(members, names)
    return Group(
        id=fields.take("id", TEXT, required=True),
        prompt=_prompt(fields, folder),
        members=members,
        scores=_scores(fields, len(members) or None, gaps=True),
        source=fields.take("source", TEXT),
        line=line,
    )


def _prompt(fields: _Fields, folder: Path) -> Prompt:
    text, image = fields.take("prompt", TEXT, required=True), fields.take("image", TEXT)
    meta = dict(fields.take("meta", OBJECT) or {})
    if image is None:
        return Prompt(text, meta)
    image = str(folder / os.path.expanduser(image))
    try:
        check_image(image)
    except ValueError as error:
        fields.problems.append(str(error))
    return Prompt(text, meta | {"image": image}, image)


def _member(row: dict[str, Any] | None, where: str, folder: Path, problems: list[str]) -> Member:
    if row is None:  # said already
        return Member(None, None)
    fields = _Fields(row, Member._fields, problems, f"{where}.")
    if not (row.get("video") or row.get("latent")):
        problems.append(f'"{where}" names no file; give "video" or "latent"')
    video = _file(fields, "video", (*VIDEO_SUFFIXES, *IMAGE_SUFFIXES), folder)
    latent = _file(fields, "latent", (".safetensors",), folder)
    return Member(video, latent, fields.take("seed", WHOLE))


def _file(fields: _Fields, name: str, suffixes: Sequence[str], folder: Path) -> Path | None:
    given = fields.take(name, TEXT)
    if given is None:
        return None
    path = folder / os.path.expanduser(given)
    if path.suffix.lower() not in suffixes:
        fields.problems.append(f'"{fields.where}{name}" is {given!r}; it should be one of {", ".join(suffixes)}')
    elif not os.path.isfile(path):  # unlike Path.is_file, also says so of a name that is too long
        fields.problems.append(f'"{fields.where}{name}": no such file: {path}')
    else:
        return path
    return None


def _scores(fields: _Fields, count: int | None, gaps: bool = False) -> dict[str, tuple]:
    table = fields.take("scores", OBJECT) or {}
    by_dimension = _Fields(table, table, fields.problems, "scores.")
    found = {name: by_dimension.list_of(name, NUMBER, count, gaps) for name in table}
    return {name: tuple(v if v is None else float(v) for v in values) for name, values in found.items() if values}


def _same_files(members: Sequence[Member], names: Sequence[str]) -> list[str]:
    first: dict[str, str] = {}
    problems = []
    for member, name in zip(members, names, strict=True):
        for path in filter(None, (member.video, member.latent)):
            other = first.setdefault(os.path.realpath(path), name)
            if other != name:
                problems.append(f"{other} and {name} are the same file, {path}; compare two")
    return problems


def _segment_problems(pair: Pair) -> list[str]:
    if pair.segment_labels is None:
        return []
    if None in (pair.segment_seconds, pair.fps, pair.frames):
        return ['"seg_labels" needs "seg_sec", "fps" and "frames", which say what the segments are']
    try:
        expected = num_segments(pair.frames, pair.fps, pair.segment_seconds)
    except ValueError as error:
        return [f"{error}; mend seg_sec or fps"]
    if len(pair.segment_labels) == expected:
        return []
    clip = f"{pair.frames} frames at {pair.fps:g} fps have {expected} segments of {pair.segment_seconds:g} s"
    return [f'"seg_labels" has {len(pair.segment_labels)} values, but {clip}; label it again, or mend these']


def _label_problems(pair: Pair) -> list[str]:
    if judged_by_people(pair.annotator):
        return []
    given = {"label": (pair.label, None)} if pair.scores else {}
    given |= {f"labels.{name}": (label, name) for name, label in pair.labels.items() if name in pair.scores}
    problems = []
    for name, (label, dimension) in given.items():
        a, b = score_of(pair, dimension)
        if label and label * (a - b) <= 0:
            problems.append(
                f'"{name}" is {label}, but {pair.annotator!r} scored a {a:g} and b {b:g}; label it again, or let '
                '"annotator" begin with "human" if people judged it'
            )
    return problems
