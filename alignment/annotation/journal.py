"""The answers of rewards, kept beside the output as they come, so that no question is asked twice.

A file of lines: the first says whose answers these are, each other one holds the numbers of one question.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from rewards.scoring.output import append_to

from ..errors import UserError
from .questions import Numbers

KEYS = ("question", "key", "numbers")  # of a line after the first


class Header(NamedTuple):
    rewards: str  # fingerprint of the rewards as they were asked for
    names: list[str]
    compares: list[str]  # of these, those that compare videos


class Journal:
    """Answers by the key of their question, in memory and in a file."""

    def __init__(self, path: Path, header: Header | None = None, rows: Iterable[dict[str, Any]] = ()):
        self.path, self.header = path, header
        self.rows = {row["key"]: row for row in rows}

    @contextmanager
    def appending(self) -> Iterator[Callable[[str, str, Numbers], None]]:
        """Take new answers meanwhile: `keep(question, key, numbers)`. What is there stays."""

        def keep(*row: Any) -> None:
            named = dict(zip(KEYS, row, strict=True))
            append(named)
            self.rows[named["key"]] = named

        with append_to(self.path, [self.header._asdict(), *self.rows.values()]) as append:
            yield keep


def read_journal(out: Path, rewards: str) -> Journal:
    """What earlier calls with this output left; without a header that is nothing. A line torn by a crash is left out.

    Args:
        rewards: fingerprint of this call's.
    Raises: UserError where the file is of other rewards, or something else; or the output there without it.
    """
    path, other = out.with_name(f"{out.name}.answers.jsonl"), "delete it or choose another --out"
    if not path.exists():
        if out.exists():
            raise UserError(f"--out: {out} exists, and no {path.name} beside it to go on from; {other}")
        return Journal(path)
    rows: list[Any] = []
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or tuple(row) != (KEYS if rows else Header._fields):
            raise UserError(f"--out: {path} line {number} was not written by this command; {other}")
        rows.append(row)
    if not rows:
        return Journal(path)
    header = Header(**rows[0])
    if header.rewards != rewards:
        names = ", ".join(header.names)
        raise UserError(f"--out: {path} holds answers of other rewards ({names}), or of other options of them; {other}")
    return Journal(path, header, rows[1:])
