"""The work of `python -m alignment.annotate`: check everything, ask, label, write, probe, sum up."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rewards.contract import RewardError

from ..data import Group, Pair, to_json
from ..errors import Problems, UserError
from .answers import Answers
from .checks import Task, checked
from .labels import MEAN, judge, pairs_from
from .probes import label_swap, static_duplicate
from .questions import Question, questions_of, videos_of
from .summary import Labelled, in_words, summarise


def annotate(options: argparse.Namespace) -> None:
    """Run the command. Raises: UserError for bad input; RewardFailed and OSError for what fails midway."""
    task = checked(options)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    needed = [column for column in (task.rule.score, task.rule.emphasis) if column and column != MEAN]
    try:
        answers = Answers(task.asked, task.journal, options.index.absolute().parent, options.batch, needed, console)
        questions = [questions_of(videos_of(record), answers.kinds, options.segments) for record in task.records]
        answers.ask([question for each in questions for question in each])
        failed = _failed(answers, task, questions, options.skip_failed)
        labelled = [found for record in task.records for found in _labelled(answers, task, record, options.segments)]
        folder = options.out.absolute().parent
        write_json(options.out, *(to_json(found.pair, folder) for found in labelled))
        probes = {} if options.no_probes else _probed(answers, task, labelled, options.segments)
    except RewardError as error:
        raise UserError(str(error)) from error
    summary = summarise(labelled, task.rule, failed, probes)
    write_json(options.out.with_name(f"{options.out.name}.summary.json"), summary, indent=2)
    console.print("\n".join([*in_words(summary), f"written: {options.out}"]))


def write_json(path: Path, *rows: dict[str, Any], indent: int | None = None) -> None:
    """Objects, each ending its line; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.writing")
    unfinished.write_text("".join(f"{json.dumps(row, ensure_ascii=False, indent=indent)}\n" for row in rows), "utf-8")
    os.replace(unfinished, path)


def _failed(answers: Answers, task: Task, questions: Sequence[list[Question]], skip: bool) -> int:
    """How many records lack an answer. Raises: Problems for these, unless they are to be skipped."""
    problems: dict[str, str] = {}
    count = 0
    for record, each in zip(task.records, questions, strict=True):
        lacking = {key: question for question in each if (key := answers.key(question)) in answers.failed}
        count += bool(lacking)
        for key, question in lacking.items():
            problems.setdefault(key, f"{task.where} line {record.line}: {question}: {answers.failed[key]}")
    if problems and not skip:
        hint = "nothing is written: the same command asks again what failed, --skip-failed leaves it out"
        raise Problems([hint, *problems.values()])
    return count


def _labelled(answers: Answers, task: Task, record: Pair | Group, seconds: float | None) -> list[Labelled]:
    judged = judge(answers, videos_of(record), seconds)
    if judged is None:
        return []
    fps, given = (record.fps, record.label) if isinstance(record, Pair) else (None, None)
    pairs = pairs_from(record, judged, task.rule, task.length_of(record), seconds)
    return [Labelled(pair, pair._replace(fps=fps), given) for pair in pairs]


def _probed(answers: Answers, task: Task, labelled: Sequence[Labelled], seconds: float | None) -> dict[str, Any]:
    videos = {video.path: video for record in task.records for video in videos_of(record)}
    still = static_duplicate(answers, list(videos.values()), task.rule)
    return {
        "static_duplicate": still,
        "label_swap": label_swap(answers, [found.asked for found in labelled], task.rule, seconds),
    }
