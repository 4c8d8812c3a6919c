"""Scores that are kept: one folder a reward, one line a score, shared by runs and never read by another reward."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from alignment.errors import UserError

Reading = Mapping[str, float]  # "total" and the dims of one clip; NaN where there is no number


class Found(NamedTuple):
    """The lines of a folder."""

    readings: dict[str, list[Reading]]  # key -> of each clip that was scored together
    failed: dict[str, str]  # key -> why there are none


class ScoreCache:
    """Of one reward: `reward.json` says what it is, each process appends to a file of its own."""

    def __init__(self, folder: Path, name: str, described: Mapping[str, Any], fingerprint: str):
        self.folder = folder / f"{re.sub(r'[^A-Za-z0-9.-]+', '_', name)}-{fingerprint}"
        self.described = dict(described)

    @property
    def scope(self) -> str | None:
        """Of the reward, if an earlier run has written it; it costs loading the weights to know."""
        try:
            return json.loads((self.folder / "reward.json").read_text("utf-8")).get("scope")
        except (OSError, ValueError):
            return None

    def start(self, scope: str) -> None:
        """Raises: UserError where nothing can be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = self.folder / f".reward.json.{os.getpid()}"
            unfinished.write_text(json.dumps({**self.described, "scope": scope}, indent=1, default=str), "utf-8")
            os.replace(unfinished, self.folder / "reward.json")
        except OSError as error:
            raise UserError(f"--cache: nothing can be written in {self.folder}: {error.strerror}") from error

    def read(self) -> Found:
        """All lines; of a key the last one. A line that a crash has torn is none."""
        found = Found({}, {})
        for file in sorted(self.folder.glob("scores-*.jsonl")):
            for line in file.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                    key, readings = row["key"], row.get("readings")
                except (ValueError, TypeError, KeyError):
                    continue
                if readings is None:
                    found.failed[key] = str(row.get("error"))
                else:
                    found.readings[key] = [{n: math.nan if v is None else v for n, v in r.items()} for r in readings]
        for key in found.readings:
            found.failed.pop(key, None)
        return found

    @contextmanager
    def writer(self, rank: int) -> Iterator[Callable[..., None]]:
        """write(key, readings=[...]) or write(key, error="..."), each in the file when it returns."""
        file = self.folder / f"scores-{os.uname().nodename}-{os.getpid()}-{rank}.jsonl"
        with file.open("ab", buffering=0) as out:

            def write(key: str, readings: list[Reading] | None = None, error: str | None = None) -> None:
                rows = readings and [{n: v if math.isfinite(v) else None for n, v in r.items()} for r in readings]
                row = {"key": key, "error": error} if error else {"key": key, "readings": rows}
                out.write(json.dumps(row).encode() + b"\n")

            yield write
        if file.stat().st_size == 0:
            file.unlink()
