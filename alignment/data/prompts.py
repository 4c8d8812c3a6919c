"""Prompts: read once, checked, and drawn in an order that depends on the seed and the position alone."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ..errors import UserError, one_line
from .stream import Stream


class Prompt(NamedTuple):
    text: str
    meta: dict[str, Any]  # the other columns of the file; rewards see them as Clip.meta
    image: str | None = None  # file of the first frame, for pipelines that are given one; meta has it, too


def read_prompts(path: str | Path, key: str = "data.prompts") -> list[Prompt]:
    """Read .txt (one a line), .jsonl (objects with "prompt") or .csv (a column "prompt"); empty lines are skipped.

    "image" in the latter two is a file, by its path or by the one from the folder of the prompts.

    Raises: UserError that names the key, the file and the line.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{key}: no such file: {path}")
    readers = {".txt": _read_text, ".jsonl": _read_json_lines, ".csv": _read_csv}
    if path.suffix not in readers:
        raise UserError(f"{key}: {path}: unknown format {path.suffix!r}; use {', '.join(readers)}")
    try:
        prompts = readers[path.suffix](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{key}: {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except (ValueError, csv.Error) as error:
        raise UserError(f"{key}: {path}: {error}") from error
    if not prompts:
        raise UserError(f"{key}: {path} holds no prompt")
    return prompts


def by_image(prompts: Sequence[Prompt]) -> list[list[int]]:
    """Positions of the prompts that a pipeline call can hold together: those with the same image."""
    found: dict[str | None, list[int]] = {}
    for i, prompt in enumerate(prompts):
        found.setdefault(prompt.image, []).append(i)
    return list(found.values())


def conditions(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What a pipeline call takes beside the prompts: their image, which they have to share.

    Raises: UserError where the file is no image any more.
    """
    path = prompts[0].image
    try:
        return {} if path is None else {"image": read_image(path)}
    except ValueError as error:
        raise UserError(str(error)) from error


def read_image(path: str) -> Image.Image:
    """All of an image, as RGB.

    Raises: ValueError, one line with the path and the reason.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # each format has its own
        reason = getattr(error, "strerror", None) or one_line(error).replace(f" {path!r}", "")
        raise ValueError(f"cannot read the image {path}: {reason}") from error


@functools.cache
def check_image(path: str) -> None:
    """Read an image once a file: prompts are read several times, and share images. Raises: as `read_image` does."""
    read_image(path)


class PromptStream(Stream[Prompt]):
    @property
    def prompts(self) -> Sequence[Prompt]:
        return self.records


def _read_text(path: Path) -> list[Prompt]:
    return [Prompt(line.strip(), {}) for line in _lines(path) if line.strip()]


def _read_json_lines(path: Path) -> list[Prompt]:
    prompts = []
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number} is not JSON: {error.msg}") from error
            prompts.append(_prompt(row, f"line {number}", path.parent))
    return prompts


def _read_csv(path: Path) -> list[Prompt]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if "prompt" not in (rows.fieldnames or ["prompt"]):
            raise ValueError(f'no column "prompt" among {", ".join(rows.fieldnames)}')
        return [_prompt(row, f"line {rows.line_num}", path.parent) for row in rows]


def _lines(path: Path) -> list[str]:
    """Lines end with a line feed only: str.splitlines also breaks at separators that JSON allows inside a string."""
    return path.read_text("utf-8-sig").split("\n")  # -sig: spreadsheets and Windows put a mark in front


def _prompt(row: Any, where: str, folder: Path) -> Prompt:
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f'{where} has no "prompt"')
    meta = {k: v for k, v in row.items() if k != "prompt"}
    if not row.get("image"):
        return Prompt(text.strip(), meta)
    if not isinstance(row["image"], str):
        raise ValueError(f'{where}: "image" is no path but {row["image"]!r}')
    image = str(folder / Path(row["image"]).expanduser())
    try:
        check_image(image)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Prompt(text.strip(), meta | {"image": image}, image)
