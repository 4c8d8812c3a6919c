"""People's votes: a page of blind side-by-side videos, and what its votes say.

`write_voting_page` writes one HTML page that needs no network, and beside it PAGE_key.json, which says on which side
which model stands: keep the key, give the page away. `read_votes` reads with the key what the page exports.

The page knows videos, prompts and numbers, no names. All videos are encoded anew as H.264 with 4:2:0 chroma, which
every browser plays, while the full chroma of the project's own clips is not for all of them; this also takes away what
a file could tell of its origin. They are embedded where they are at most MAX_EMBEDDED bytes together; otherwise all of
them lie in the folder PAGE_videos beside the page, to be given away with it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import random
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignment.errors import Problems, UserError, one_line
from alignment.files import replacing_folder
from alignment.generation import whole

from .voting_page import encode, render

QUESTIONS = ("overall", "VQ", "MQ", "TA")  # the last three are asked where the voter wishes so
CHOICES = ("left", "tie", "right")
MAX_EMBEDDED = 48 * 2**20  # bytes of all videos together, before base64 makes them a third larger
MAX_NAME = 80


class Comparison(NamedTuple):
    id: str
    prompt: str
    left_name: str  # which of the two models a voter sees on the left is drawn anew
    right_name: str
    left: Path
    right: Path


class Vote(NamedTuple):
    id: str  # of the comparison
    voter: str
    question: str  # one of QUESTIONS
    models: tuple[str, str]  # as in the comparison: left_name, right_name
    winner: str | None  # None: a tie


def write_voting_page(path: Path, comparisons: Sequence[Comparison], seed: int) -> None:
    """Write the page and its key.

    Args:
        path: of the page, PAGE.html; PAGE_key.json, and where they are many PAGE_videos, are written beside it.
        seed: of the sides. As many comparisons of the same two models are shown in the given order as in the other,
            give or take one.
    Raises: UserError, one line: a video that cannot be read. ValueError: no comparison, or an id twice.
    """
    if not comparisons or len({c.id for c in comparisons}) < len(comparisons):
        raise ValueError("comparisons need ids of their own, and there has to be one")
    exchanged = _exchanged(comparisons, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".voting.", dir=path.parent) as folder:
        files = []
        for i, (comparison, exchange) in enumerate(zip(comparisons, exchanged, strict=True), 1):
            sides = [comparison.left, comparison.right]
            for side, video in zip("ab", reversed(sides) if exchange else sides, strict=True):
                files.append(encode(video, Path(folder) / f"{i:04d}_{side}.mp4"))
        embedded = sum(file.stat().st_size for file in files) <= MAX_EMBEDDED
        if embedded:
            sources = [base64.b64encode(file.read_bytes()).decode("ascii") for file in files]
        else:
            videos = path.with_name(f"{path.stem}_videos")
            with replacing_folder(videos) as new:
                sources = [f"{videos.name}/{shutil.move(file, new / file.name).name}" for file in files]
    key = _key(comparisons, exchanged)
    asked = [
        {"prompt": c.prompt, "left": left, "right": right}
        for c, left, right in zip(comparisons, sources[::2], sources[1::2], strict=True)
    ]
    page = render({"page": key["page"], "embedded": embedded, "comparisons": asked})
    whole(path, lambda aside: aside.write_text(page, "utf-8"))
    whole(key_of(path), lambda aside: aside.write_text(json.dumps(key, indent=1), "utf-8"))


def key_of(page: Path) -> Path:
    """Where the key of a page lies."""
    return page.with_name(f"{page.stem}_key.json")


def read_votes(path: Path, key: Path) -> list[Vote]:
    """Read what the page exports, as it was meant for the page of this key only.

    Raises: UserError with a line for everything that is wrong: not JSON, votes of another page, comparisons or choices
        that there are not, a question answered twice.
    """
    sides = _read_key(key)
    content = _read_json(path, "votes")
    if not isinstance(content, dict) or not isinstance(content.get("votes"), list):
        raise UserError(f"{path}: not the votes of a voting page; press Export there")
    if content.get("page") != sides["page"]:
        raise UserError(f"{path}: votes of another page than {key} belongs to")
    names = [_plain(content.get(field)) for field in ("name", "voter")]
    voter = next((name for name in names if name), "")
    if not voter:
        raise UserError(f'{path}: no "name" and no "voter"; press Export on the page')
    votes, problems = {}, []
    for number, row in enumerate(content["votes"], 1):
        try:
            vote = _vote(row, voter, sides["comparisons"])
            if (vote.id, vote.question) in votes:
                raise ValueError(f"{vote.question!r} of comparison {row['comparison']!r} is answered twice")
            votes[vote.id, vote.question] = vote
        except ValueError as error:
            problems.append(f"{path}: vote {number}: {error}")
    if problems:
        raise Problems(problems)
    return list(votes.values())


class Count(NamedTuple):
    """How often the first of two models won, by the votes on one question."""

    models: tuple[str, str]
    question: str
    voter: str | None  # None: all voters together
    wins: int
    ties: int
    losses: int

    @property
    def win_rate(self) -> float:
        """Of the first model; a tie is half a win."""
        return (self.wins + self.ties / 2) / (self.wins + self.ties + self.losses)


class Agreement(NamedTuple):
    """How often two voters say the same of the comparisons that both have seen."""

    question: str
    voters: tuple[str, str]
    shared: int
    same: int
    kappa: float | None  # Cohen's, 1 for full agreement, 0 for chance; None where chance is always right


class Tally(NamedTuple):
    counts: list[Count]
    agreement: list[Agreement]


def tally(votes: Sequence[Vote]) -> Tally:
    """Wins, ties and losses by models, question and voter, and how far voters agree.

    Raises: UserError where a voter has voted twice on the same: a file that was given twice, or two people of one name.
    """
    groups: dict[tuple[tuple[str, str], str, str | None], list[Vote]] = defaultdict(list)
    answers: dict[str, dict[str, dict[str, str]]] = {question: {} for question in QUESTIONS}
    for vote in votes:
        theirs = answers[vote.question].setdefault(vote.voter, {})
        if vote.id in theirs:
            raise UserError(f"{vote.voter} votes twice on {vote.id!r} ({vote.question}); give each person's file once")
        theirs[vote.id] = _outcome(vote)
        for voter in (None, vote.voter):
            groups[vote.models, vote.question, voter].append(vote)
    counts = []
    for (models, question, voter), group in groups.items():
        outcomes = [_outcome(vote) for vote in group]
        counts.append(Count(models, question, voter, *(outcomes.count(o) for o in ("win", "tie", "loss"))))
    agreement = []
    for question, voters in answers.items():
        for i, first in enumerate(voters):
            for second in list(voters)[i + 1 :]:
                shared = [(voters[first][k], voters[second][k]) for k in voters[first] if k in voters[second]]
                if shared:
                    same = sum(a == b for a, b in shared)
                    agreement.append(Agreement(question, (first, second), len(shared), same, kappa(shared)))
    return Tally(counts, agreement)


def kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """Of two raters: (p - e) / (1 - e), p how often they agree, e how often they would by chance.

    Source: Cohen, A coefficient of agreement for nominal scales, Educational and Psychological Measurement 20 (1960).
    """
    n = len(pairs)
    first, second = zip(*pairs, strict=True)
    chance = sum(first.count(label) * second.count(label) for label in set(first)) / n**2
    return None if chance == 1 else (sum(a == b for a, b in pairs) / n - chance) / (1 - chance)


def _outcome(vote: Vote) -> str:
    return "tie" if vote.winner is None else "win" if vote.winner == vote.models[0] else "loss"


def _exchanged(comparisons: Sequence[Comparison], seed: int) -> list[bool]:
    """Which comparisons are shown the other way round: half of those of the same two models."""
    rng = random.Random(seed)
    same: dict[tuple[str, str], list[int]] = defaultdict(list)
    for i, comparison in enumerate(comparisons):
        same[comparison.left_name, comparison.right_name].append(i)
    exchanged = [False] * len(comparisons)
    for indices in same.values():
        for i in rng.sample(indices, (len(indices) + rng.randrange(2)) // 2):
            exchanged[i] = True
    return exchanged


def _key(comparisons: Sequence[Comparison], exchanged: Sequence[bool]) -> dict[str, Any]:
    """The page's name, made of videos, prompts and sides: votes of two pages are not mixed up, and go on where one is
    written again. Its comparisons by the number that the page knows."""
    digest = hashlib.sha256(json.dumps([exchanged, [c[:4] for c in comparisons]]).encode())
    rows = {}
    for number, (comparison, exchange) in enumerate(zip(comparisons, exchanged, strict=True), 1):
        for video in (comparison.left, comparison.right):
            digest.update(hashlib.sha256(video.read_bytes()).digest())
        models = [comparison.left_name, comparison.right_name]
        rows[str(number)] = {
            "id": comparison.id,
            "prompt": comparison.prompt,
            "models": models,
            "left": models[1 if exchange else 0],
        }
    return {"page": digest.hexdigest()[:16], "comparisons": rows}


def _read_json(path: Path, what: str) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: no {what}, as it is not JSON: {one_line(error)}") from error


def _read_key(path: Path) -> dict[str, Any]:
    key = _read_json(path, "key")
    try:
        fine = isinstance(key["page"], str) and all(
            isinstance(row["id"], str) and len(row["models"]) == 2 and row["left"] in row["models"]
            for row in key["comparisons"].values()
        )
    except (AttributeError, KeyError, TypeError):
        fine = False
    if not fine:
        raise UserError(f"{path}: not the key of a voting page; it is written beside the page as PAGE_key.json")
    return key


def _plain(name: Any) -> str:
    """A name as it can be printed in a line; "" if it is none."""
    if not isinstance(name, str):
        return ""
    return " ".join("".join(c if c.isprintable() else " " for c in name).split())[:MAX_NAME]


def _vote(row: Any, voter: str, comparisons: dict[str, Any]) -> Vote:
    fields = [row.get(field) if isinstance(row, dict) else None for field in ("comparison", "question", "choice")]
    known = (
        ("comparison", f"1 to {len(comparisons)}", comparisons),
        ("question", ", ".join(QUESTIONS), QUESTIONS),
        ("choice", ", ".join(CHOICES), CHOICES),
    )
    for value, (field, allowed, among) in zip(fields, known, strict=True):
        if not isinstance(value, str) or value not in among:
            raise ValueError(f"{field} {value!r:.40} is not one of {allowed}")
    number, question, choice = fields
    entry = comparisons[number]
    models = tuple(entry["models"])
    left, right = models if models[0] == entry["left"] else models[::-1]
    winner = {"left": left, "tie": None, "right": right}[choice]
    return Vote(entry["id"], voter, question, models, winner)
