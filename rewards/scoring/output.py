"""What `python -m rewards.score` writes, and how a later run goes on from it.

Rows are appended to a .jsonl file, one line each; a .csv or .parquet file is written whole at the end from such a file
beside it. A file belongs to one set of rewards: with others it is refused, and so are rows of other videos.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rewards.arguments import RewardArgument
from rewards.contract import RewardError
from rewards.scoring.asking import Row
from rewards.scoring.tables import Video

FORMATS = (".jsonl", ".csv", ".parquet")
START = b'{"path": '  # of every line
LAST = ("key", "rewards")  # columns: what identifies the video, and the rewards


def check_output(out: Path, dense: bool) -> None:
    """Raises: RewardError where the file could not be written in the end."""
    suffix = out.suffix.lower()
    if suffix not in FORMATS:
        raise RewardError(f"--out: {out}: unknown format {suffix!r}; use {', '.join(FORMATS)}")
    if dense and suffix != ".jsonl":
        raise RewardError(f"--dense: {out}: scores of frames need a .jsonl file")
    if os.path.isdir(out):
        raise RewardError(f"--out: {out} is a folder")
    there = next(parent for parent in out.absolute().parents if os.path.exists(parent))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise RewardError(f"--out: {out}: nothing can be written in {there}; choose another place")
    if suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise RewardError('--out: .parquet needs pyarrow: pip install "reelign[parquet]"') from error
    if suffix != ".jsonl" and out.exists() and not journal_of(out).exists():
        raise RewardError(f"--out: {out} exists, and nothing beside it to go on from; delete it or choose another")


def journal_of(out: Path) -> Path:
    """The .jsonl file that rows are appended to."""
    return out if out.suffix.lower() == ".jsonl" else out.with_name(f"{out.name}.partial.jsonl")


def fingerprint(rewards: Mapping[str, RewardArgument], dense: bool) -> str:
    """Of the rewards as they were asked for, and of the text of a user's own .py files, not of weights."""
    asked = json.dumps([dense, *rewards.values()], sort_keys=True, default=str)
    files = [Path(name) for name in re.findall(r'"([^"]+\.py):\w+"', asked)]  # also within options, as a part
    return _hash("".join([asked, *(_hash(file.read_bytes()) for file in files if file.is_file())]).encode())


def key_of(video: Video) -> str:
    """Of a video as it was asked for: name, prompt, rate, other columns, and the size of its file."""
    identity = [video.name, video.prompt, video.fps, dict(video.meta), video.path.stat().st_size]
    return _hash(json.dumps(identity, sort_keys=True, default=str).encode())


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def read_rows(journal: Path, rewards: str, keys: Iterable[str]) -> dict[str, Row]:
    """The rows of an earlier run: key -> row. A last line that was torn by a crash is left out.

    Args:
        rewards: fingerprint of this run's rewards.
        keys: of this run's videos.
    Raises: RewardError where the file is something else, or of other rewards or videos.
    """
    if not journal.exists():
        return {}
    rows, wanted = {}, set(keys)
    other = "delete it or choose another --out"
    *lines, torn = journal.read_bytes().split(b"\n")  # after the last line feed: nothing, or a line cut by a crash
    if torn[: len(START)] != START[: len(torn)]:
        lines.append(torn)
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            key, earlier = row["key"], row["rewards"]
        except (ValueError, TypeError, KeyError) as error:
            raise RewardError(f"--out: {journal} line {number} was not written by this command; {other}") from error
        if earlier != rewards:
            raise RewardError(f"--out: {journal} holds scores of other rewards, or of other options of them; {other}")
        if key not in wanted and not is_complete(row):
            continue  # a broken file that was mended has another size
        if key not in wanted:
            what = f"{row.get('path')} with another prompt, rate or size, or not among --videos"
            raise RewardError(f"--out: {journal} line {number} is of other videos ({what}); {other}")
        rows[key] = row
    return rows


def is_complete(row: Row) -> bool:
    """Whether nothing failed; what failed is tried again by a later run."""
    return row["error"] is None and all(value for column, value in row.items() if column.endswith(":valid"))


def json_line(row: Row) -> bytes:
    return json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"


@contextmanager
def append_to(journal: Path | None, rows: Iterable[Row]) -> Iterator[Callable[[Row], None]]:
    """Write what stays of an earlier run; then every row as it comes, so that a crash loses the last one at most."""
    if journal is None:
        yield lambda row: None
        return
    journal.parent.mkdir(parents=True, exist_ok=True)
    write_rows(journal, list(rows))
    with journal.open("ab", buffering=0) as file:
        yield lambda row: file.write(json_line(row))


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write a whole .jsonl, .csv or .parquet file; whoever looks sees the old one or the new one."""
    unfinished = path.with_name(f"{path.name}.writing")
    columns = list(dict.fromkeys(column for row in rows for column in row if column not in LAST)) + list(LAST)
    if path.suffix.lower() == ".jsonl":
        unfinished.write_bytes(b"".join(map(json_line, rows)))
    elif path.suffix.lower() == ".csv":
        with unfinished.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, columns)
            table.writeheader()
            table.writerows(rows)
    else:
        import pyarrow
        import pyarrow.parquet

        schema = pyarrow.schema([(column, _type(column)) for column in columns])
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), unfinished)
    os.replace(unfinished, path)


def _type(column: str) -> str:
    if column in ("path", "prompt", "error", *LAST):
        return "string"
    return "bool" if column.endswith(":valid") else "int64" if column == "frames" else "float64"
