"""From a file to a benchmark: rows of any kind of table, the layout that they are in, and their media.

All that is wrong with a file is found before anything is raised.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.errors import Problems, UserError, one_line

from .data import Benchmark, assemble, check_missing
from .layouts import FORMATS, Row

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet")
Rows = list[tuple[int, Any]]  # line, or place from 1 on, and what stands there


def read_benchmark(
    data: str | Path,
    format: str | None = None,
    media: str | Path | None = None,
    allow_missing: bool = False,
    store: Path = Path("runs/reward_scores/media"),
) -> Benchmark:
    """Read preference data.

    Args:
        data: .csv, .json (a list), .jsonl or .parquet.
        format: a key of FORMATS; None: what the columns say.
        media: folder where the names of media begin; None: the data's own.
        allow_missing: leave out pairs whose media are not there.
        store: where media go that the data hold themselves.
    Raises: UserError; Problems, one line for each row that is wrong, or for what is missing.
    """
    file = Path(data).expanduser()
    root = file.parent if media is None else Path(media).expanduser()
    if media is not None and not root.is_dir():
        raise UserError(f"--media: no such folder: {root}")
    root = root.absolute()  # preference files name media from the working folder
    rows = read_rows(file)
    if not rows:
        raise UserError(f"--data: {file} is empty")
    format = format or recognise(rows, file)
    layout, problems, records, ids = FORMATS[format], [], [], {}
    for number, values in rows:
        if not isinstance(values, Mapping):
            problems.append(f"--data: {file} line {number}: no object, but {values!r:.60}")
            continue
        row = Row(values, number, root)
        record = layout.parse(row)
        problems += [f"--data: {file} line {number}: {problem}" for problem in row.problems]
        if record is not None:
            taken = ids.setdefault(record.id, number) != number  # ids name margins and disagreements
            records.append(record._replace(id=f"{record.id} (line {number})") if taken else record)
    if problems:
        raise Problems(problems)
    found = assemble(records, format, file, root, layout.folders, store)
    check_missing(found, root, layout.folders, layout.source, allow_missing)
    return found


def recognise(rows: Rows, file: Path) -> str:
    """The layout whose columns are there. Raises: UserError that names those of all."""
    columns = {column for _, values in rows[:100] if isinstance(values, Mapping) for column in values}
    for name, layout in FORMATS.items():
        if any(needed <= columns for needed in layout.needs):
            return name
    known = "; ".join(f"{name} ({', '.join(sorted(layout.needs[0]))})" for name, layout in FORMATS.items())
    there = ", ".join(sorted(map(str, columns))) or "none"
    raise UserError(f"--data: {file}: columns {there} are those of no known layout: {known}")


def read_rows(file: Path) -> Rows:
    """The rows of a table. Raises: UserError, Problems."""
    if not file.is_file():
        raise UserError(f"--data: no such file: {file}")
    suffix = file.suffix.lower()
    if suffix not in SUFFIXES:
        raise UserError(f"--data: {file}: unknown format {suffix!r}; use {', '.join(SUFFIXES)}")
    if suffix == ".parquet":
        return _parquet(file)
    try:
        text = file.read_bytes().removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise UserError(f"--data: {file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise UserError(f"--data: {file}: cannot be read: {error.strerror}") from error
    return {".csv": _csv, ".json": _json, ".jsonl": _json_lines}[suffix](text, file)


def _csv(text: str, file: Path) -> Rows:
    table, rows, problems = csv.DictReader(io.StringIO(text, newline=""), strict=True), [], []
    try:
        for row in table:
            if None in row:
                problems.append(f"--data: {file} line {table.line_num}: more cells than columns; quote commas")
            else:
                rows.append((table.line_num, row))
    except csv.Error as error:
        problems.append(f"--data: {file} line {table.reader.line_num}: {error}; what follows was not read")
    if problems:
        raise Problems(problems)
    return rows


def _json(text: str, file: Path) -> Rows:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"--data: {file}: not JSON: {one_line(error)}") from error
    if not isinstance(content, list):
        raise UserError(f"--data: {file} holds no list of rows")
    return list(enumerate(content, 1))


def _json_lines(text: str, file: Path) -> Rows:
    rows, problems = [], []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [(number, json.loads(line))] if line.strip() else []
        except (ValueError, RecursionError) as error:
            problems.append(f"--data: {file} line {number}: not JSON: {one_line(error)}")
    if problems:
        raise Problems(problems)
    return rows


def _parquet(file: Path) -> Rows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError('--data: .parquet needs pyarrow: pip install "reelign[parquet]"') from error
    try:
        return list(enumerate(pyarrow.parquet.read_table(file).to_pylist(), 1))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"--data: {file}: not a parquet file, or damaged: {one_line(error)}") from error
