"""The layouts in which preference data are published, one function a row each.

Sources: VideoAlign, datasets/train/README.md and eval_videogen_rewardbench.py; the cards of the data sets
KlingTeam/VideoGen-RewardBench, TIGER-Lab/GenAI-Bench, MJ-Bench/MJ-BENCH-VIDEO and ymhao/HPDv2; data/test.json of
THUDM/ImageReward; MJ-Video's datas/test.json.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignment.data import Group, combined, label_from_scores, parse_record
from alignment.data import Pair as Preference
from alignment.data.preferences import deciding

from .data import OVERALL, Labels, Media, Record

CHOICES = {"A": 1, "B": -1, "same": 0}
VOTES = {"leftvote": 1, "rightvote": -1, "tievote": 0, "bothbad_vote": 0}
PREFERENCES = {"video 1 better": 1, "video 2 better": -1, "same": 0}  # a few rows of the data set write "Better"
HUB = "https://huggingface.co/datasets"


class Row:
    """One row. What is wrong with it goes to `problems`."""

    def __init__(self, values: Mapping[str, Any], number: int, folder: Path):
        self.values, self.number, self.folder, self.problems = values, number, folder, []

    def text(self, key: str) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value.strip():
            self.problems.append(f'no "{key}", or it is no text')
            return ""
        if value.encode(errors="ignore").decode() != value:  # JSON may hold halves of characters
            self.problems.append(f'"{key}" is {value!r:.60}, which is no Unicode text')
        return value.strip()

    def optional(self, key: str) -> str | None:
        value = self.values.get(key)
        return value.strip() or None if isinstance(value, str) else None

    def fps(self, key: str) -> float | None:
        value = self.values.get(key)
        if value is None or value == "":
            return None
        try:
            fps = float(value)
        except (TypeError, ValueError):
            fps = math.nan
        if not 0 < fps < math.inf:
            self.problems.append(f'"{key}" is {value!r}; it should be a number above 0, or empty')
            return None
        return fps

    def list_of(self, key: str, kind: type | tuple[type, ...], count: int | None = None) -> list:
        values = self.values.get(key)
        if not isinstance(values, list) or not all(isinstance(v, kind) and not isinstance(v, bool) for v in values):
            self.problems.append(f'"{key}" should be a list of {"text" if kind is str else "numbers"}')
            return []
        if len(values) != (len(values) if count is None else count):
            self.problems.append(f'"{key}" has {len(values)} values for {count} media')
        return values

    def media(self, key: str, fps: str = "", model: str = "") -> Media:
        """A file's name, or the file itself as parquet holds it: bytes, or {"bytes", "path"}."""
        value = self.values.get(key)
        held = value if isinstance(value, Mapping) else {"bytes": value} if isinstance(value, bytes) else {}
        rest = (self.fps(fps) if fps else None, self.optional(model) if model else None)
        if held.get("bytes"):
            return Media(f"{self.number}/{key}/{held.get('path') or ''}", *rest, held["bytes"])
        if isinstance(held.get("path"), str):
            return Media(held["path"], *rest)
        return Media(self.text(key), *rest)


def pair_of_paths(row: Row) -> Record:
    """VideoAlign's tables: a label that is empty or no known word is invalid."""
    media = (row.media("path_A", "fps_A", "A_model"), row.media("path_B", "fps_B", "B_model"))
    labels = {dim: CHOICES.get(row.optional(dim)) for dim in ("VQ", "MQ", "TA", OVERALL) if dim in row.values}
    if not labels:
        row.problems.append(f"no label; a table of pairs has one of VQ, MQ, TA, {OVERALL}, each {', '.join(CHOICES)}")
    return _pair(row, "prompt", media, labels)


def genai_bench(row: Row) -> Record:
    """Two sorts of ties, "both good" and "both bad", count as the same."""
    names = ("left_video", "right_video") if "left_video" in row.values else ("video_left", "video_right")
    media = tuple(row.media(name, model=f"{name.replace('video', '').strip('_')}_model") for name in names)
    vote = row.text("vote_type")
    if vote and vote not in VOTES:
        row.problems.append(f'"vote_type" is {vote!r}; it should be one of {", ".join(VOTES)}')
    return _pair(row, "prompt", media, {OVERALL: VOTES.get(vote)})


def mj_bench_video(row: Row) -> Record:
    """Labels count in any case of letters; "Hard to judge" is invalid."""
    words = row.values.get("category_preference") or {}
    if not isinstance(words, Mapping):
        row.problems.append('"category_preference" should be an object')
        words = {}
    labels = {dim: PREFERENCES.get(str(word).lower()) for dim, word in words.items()}
    labels[OVERALL] = PREFERENCES.get(row.text("overall_preference").lower())
    return _pair(row, "caption", (row.media("video_0_path"), row.media("video_1_path")), labels)


def hpdv2(row: Row) -> Record:
    """The rank is the mean of several people's."""
    return _ranked(row, "image_path", "rank")


def image_reward(row: Row) -> Record:
    return _ranked(row, "generations", "ranking")


def _ranked(row: Row, files: str, ranks: str) -> Record:
    """A lower rank is better."""
    names = row.list_of(files, str)
    order = row.list_of(ranks, (int, float), len(names))
    pairs = itertools.combinations(range(len(names) if len(order) == len(names) else 0), 2)
    comparisons = tuple((i, j, {OVERALL: (order[i] < order[j]) - (order[i] > order[j])}) for i, j in pairs)
    return Record(_id(row), row.text("prompt"), tuple(map(Media, names)), comparisons)


def preferences(row: Row) -> Record | None:
    """Our own pairs and groups (alignment.data.preference_json); labels that are not there follow the scores."""
    members = row.values.get("members", [row.values.get("a"), row.values.get("b")])
    members = members if isinstance(members, list) else []
    names = [member.get("video") for member in members if isinstance(member, Mapping)]
    named = [name for name in names if isinstance(name, str)]
    missing = [name for name in named if not os.path.isfile(row.folder / os.path.expanduser(name))]
    if missing and isinstance(row.values.get("prompt"), str):  # said together, whatever else is wrong with the row
        pairs = [(i, j, {OVERALL: None}) for i, j in itertools.combinations(range(len(named)), 2)]
        return Record(_id(row), row.values["prompt"], tuple(map(Media, named)), tuple(pairs))
    record, wrong = parse_record(row.values, row.folder, row.number)
    row.problems += wrong
    if record is None:
        return None
    if any(member.video is None for member in record.members):
        row.problems.append("a member has no video, only a latent; rewards look at videos")
        return None
    fps = record.fps if isinstance(record, Preference) else None
    media = tuple(Media(str(member.video), fps) for member in record.members)
    comparisons = _from_group(record) if isinstance(record, Group) else ((0, 1, _from_pair(record)),)
    if not any(labels for *_, labels in comparisons):
        row.problems.append("neither labels nor scores; annotate it")
    return Record(record.id, record.prompt.text, media, tuple(comparisons), record.prompt.meta)


def _from_pair(pair: Preference) -> Labels:
    scored = {dim: label_from_scores({dim: both}) for dim, both in pair.scores.items()}
    overall = label_from_scores(pair.scores, deciding(pair)) if pair.label is None else pair.label
    return {**scored, **pair.labels} | ({} if overall is None else {OVERALL: overall})


def _from_group(group: Group) -> list[tuple[int, int, Labels]]:
    """All pairs of a group, labelled by its scores and by their mean."""
    rows = [dict(zip(group.scores, values, strict=True)) for values in zip(*group.scores.values(), strict=True)]
    columns = {**group.scores, OVERALL: tuple(map(combined, rows))}
    found = []
    for i, j in itertools.combinations(range(len(rows)), 2):
        pairs = {dim: (values[i], values[j]) for dim, values in columns.items()}
        labels = {dim: label_from_scores({dim: both}) for dim, both in pairs.items() if None not in both}
        found.append((i, j, labels))
    return found


def _pair(row: Row, prompt: str, media: tuple[Media, ...], labels: Labels) -> Record:
    return Record(_id(row), row.text(prompt), media, ((0, 1, labels),))


def _id(row: Row) -> str:
    return str(row.values.get("id", row.number))


class Layout(NamedTuple):
    title: str
    needs: Sequence[frozenset[str]]  # columns that tell it, one set or another
    parse: Callable[[Row], Record | None]
    folders: tuple[str, ...]  # in which its media are published
    source: str  # where it can be got


def _needs(*sets: str) -> tuple[frozenset[str], ...]:
    return tuple(frozenset(names.split()) for names in sets)


FORMATS = {
    "videogen_rewardbench": Layout(
        "VideoGen-RewardBench",
        _needs("path_A path_B A_model B_model prompt Overall"),
        pair_of_paths,
        ("videos",),
        f"{HUB}/KlingTeam/VideoGen-RewardBench, videos.zip",
    ),
    "video_align": Layout(
        "Pairs in VideoAlign's layout",
        _needs("path_A path_B prompt"),
        pair_of_paths,
        ("videos",),
        "whoever made the table has the videos",
    ),
    "genai_bench": Layout(
        "GenAI-Bench, video generation",
        _needs("prompt left_video right_video vote_type", "prompt video_left video_right vote_type"),
        genai_bench,
        ("videos",),
        f"{HUB}/TIGER-Lab/GenAI-Bench, whose column of videos holds addresses",
    ),
    "mj_bench_video": Layout(
        "MJ-Bench-Video",
        _needs("caption video_0_path video_1_path overall_preference"),
        mj_bench_video,
        ("videos",),
        f"{HUB}/MJ-Bench/MJ-BENCH-VIDEO, folder videos",
    ),
    "hpdv2": Layout(
        "HPDv2 test",
        _needs("prompt image_path rank"),
        hpdv2,
        ("test",),
        f"{HUB}/ymhao/HPDv2, test.tar.gz",
    ),
    "image_reward": Layout(
        "ImageReward test",
        _needs("prompt generations ranking"),
        image_reward,
        ("test_images", "images"),
        f"{HUB}/THUDM/ImageRewardDB",
    ),
    "preferences": Layout(
        "Preferences",
        _needs("prompt a b", "prompt members"),
        preferences,
        (),
        "make them with alignment.generate",
    ),
}
