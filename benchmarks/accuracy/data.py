"""Preference data in one form: media with their prompts, and pairs of them with what people said.

A ranking of several is all of its pairs; their `record` is the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from alignment.errors import Problems

Labels = Mapping[str, int | None]  # dimension -> 1: the first is better, -1: the second is, 0: a tie, None: invalid
OVERALL = "Overall"
NAMED = 3  # missing files that are named


class Media(NamedTuple):
    """A video or image as a data set names it."""

    name: str
    fps: float | None = None  # None: the file says
    model: str | None = None  # that made it
    data: bytes | None = None  # the file itself, where the data set holds it


class Record(NamedTuple):
    """One row of a data set: media of one prompt, and which of them are compared."""

    id: str
    prompt: str
    media: tuple[Media, ...]
    comparisons: tuple[tuple[int, int, Labels], ...]
    meta: Mapping[str, Any] = {}  # further facts on the prompt, for rewards


class Item(NamedTuple):
    """A video or image that is there, with its prompt."""

    name: str
    path: Path
    prompt: str
    fps: float | None
    model: str | None
    meta: Mapping[str, Any]


class Pair(NamedTuple):
    record: str
    a: int  # places in Benchmark.items
    b: int
    labels: Labels


@dataclass
class Benchmark:
    format: str
    file: Path
    items: list[Item] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    dims: list[str] = field(default_factory=list)  # in the order in which they are shown
    missing: list[str] = field(default_factory=list)  # media that are named and not there
    named: int = 0  # media that are named
    named_pairs: int = 0  # pairs with those whose media are missing

    @property
    def prompts(self) -> list[str]:
        """Of each pair."""
        return [self.items[pair.a].prompt for pair in self.pairs]


def assemble(
    records: Iterable[Record], format: str, file: Path, media: Path, folders: Sequence[str], store: Path
) -> Benchmark:
    """Find the media of records; pairs of which one is missing are left out.

    Args:
        media: where names begin.
        folders: of it, in which data sets are published: names are looked for there, too, without their own folders.
        store: folder for media that the data set holds itself.
    """
    found, places = Benchmark(format, file), {}
    seen: dict[tuple[str, str | None], Path | None] = {}
    for record in records:
        kept = {}
        for index, item in enumerate(record.media):
            known = (item.name, item.model)
            if known not in seen:
                seen[known] = _kept(item, store) if item.data is not None else _find(item, media, folders)
            if path := seen[known]:
                entry = Item(item.name, path, record.prompt, item.fps, item.model, record.meta)
                kept[index] = places.setdefault((path, record.prompt, item.fps), len(places))
                if kept[index] == len(found.items):
                    found.items.append(entry)
        for i, j, labels in record.comparisons:
            found.named_pairs += 1
            found.dims += [dim for dim in labels if dim not in found.dims]
            if i in kept and j in kept:
                found.pairs.append(Pair(record.id, kept[i], kept[j], labels))
    found.dims.sort(key=lambda dim: dim != OVERALL)  # first, the others as they come
    found.named, found.missing = len(seen), [name for (name, _), path in seen.items() if path is None]
    return found


def check_missing(found: Benchmark, media: Path, folders: Sequence[str], source: str, allowed: bool) -> None:
    """Raises: Problems that say what is missing, where it was looked for, and where the data set can be got."""
    if found.pairs and (allowed or not found.missing):
        return
    if not found.missing:
        raise Problems([f"--data: {found.file}: no pair to compare"])
    names = ", ".join(found.missing[:NAMED]) + (" ..." if len(found.missing) > NAMED else "")
    looked = ", ".join(str(media / folder) if folder else str(media) for folder in ("", *folders))
    left = f"{len(found.pairs)} of {found.named_pairs} pairs have both of theirs"
    ways = f"get them: {source}; name their folder with --media"
    raise Problems(
        [
            f"--data: {found.file}: {len(found.missing)} of {found.named} media files are missing, {left}",
            f"looked in {looked} for {names}",
            ways + ("" if allowed or not found.pairs else ", or score what is there with --allow-missing"),
        ]
    )


def _find(item: Media, root: Path, folders: Sequence[str]) -> Path | None:
    """The file of a name, which may be an address of which only the last part is on disk."""
    base = item.name.rpartition("/")[2]
    names = [base] if "://" in item.name else [item.name, base]
    names += [f"{item.model}{mark}{base}" for mark in "/_" if item.model]
    for name in names:
        for folder in ("", *folders):
            path = root / folder / os.path.expanduser(name)
            if os.path.isfile(path):  # unlike Path.is_file, also of a name that is too long
                return Path(os.path.abspath(path))
    return None


def _kept(item: Media, store: Path) -> Path:
    """The file with what the data set holds, written once."""
    suffix = Path(item.name).suffix.lower() or ".mp4"
    path = store / f"{hashlib.sha256(item.data).hexdigest()[:32]}{suffix}"
    if not path.is_file():
        store.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{os.getpid()}")
        unfinished.write_bytes(item.data)
        os.replace(unfinished, path)
    return path.absolute()
