"""Asking what was not asked before, with a bar on a terminal and a line a question elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rewards.arguments import RewardArgument
from rewards.comparison import WinRate
from rewards.contract import Clip, Reward, RewardError, one_line
from rewards.scoring.command import ahead, load_all
from rewards.scoring.output import fingerprint

from ..errors import UserError
from .journal import Header, Journal
from .questions import Answer, Numbers, Question, Read, answers_of, read_clips


class Answers:
    """What the rewards say.

    Args:
        asked: the rewards; they are loaded when there is something to ask, at the latest.
        folder: that files are named from.
        batch: questions a call.
        needed: columns that have to be there.
    """

    def __init__(
        self,
        asked: Mapping[str, RewardArgument],
        journal: Journal,
        folder: Path,
        batch: int,
        needed: Sequence[str],
        console: Console,
    ):
        self.asked, self.journal, self.folder, self.batch = asked, journal, folder, batch
        self.needed, self.console = needed, console
        self.failed: dict[str, str] = {}  # key of a question -> why it has no answer
        self._rewards: dict[str, Reward] = {}
        if journal.header is None:
            compares = [name for name, reward in self._loaded().items() if reward.scope == "group"]
            journal.header = Header(fingerprint(asked, dense=False), list(asked), compares)

    @property
    def names(self) -> list[str]:
        return list(self.asked)

    @property
    def kinds(self) -> set[bool]:
        """Whether there are rewards that score a video (False), and such that compare two (True)."""
        return {name in self.journal.header.compares for name in self.names}

    def key(self, question: Question) -> str:
        return question.key(self.folder)

    def numbers(self, question: Question) -> Numbers | None:
        """The answer; None where there is none."""
        row = self.journal.rows.get(self.key(question))
        return row and row["numbers"]

    def ask(self, questions: Sequence[Question]) -> None:
        """Ask what has no answer yet; what failed stands in `failed`.

        Raises: RewardError, RewardFailed for rewards that cannot be loaded, or fail; UserError for a column that a
            reward does not have. What was answered before is kept.
        """
        wanted = {self.key(question): question for question in questions}
        for key in wanted.keys() & self.journal.rows:
            self._check_columns(self.journal.rows[key]["numbers"])
        left = {key: question for key, question in wanted.items() if key not in self.journal.rows}
        if len(left) < len(wanted):
            self.console.print(f"{len(wanted) - len(left)} of {len(wanted)} answers are there already")
        if not left:
            return
        self._loaded()
        with self.journal.appending() as keep, self._progress(len(left)) as bar:
            for key, answer in self._answered(left):
                if answer.error:
                    self.failed[key] = answer.error
                else:
                    self._check_columns(answer.numbers)
                    keep(str(left[key]), key, answer.numbers)
                self._show(bar, left[key], answer)

    def _loaded(self) -> dict[str, Reward]:
        if not self._rewards:
            rewards = load_all(self.asked)
            for name, reward in rewards.items():
                if reward.scope == "batch":
                    raise RewardError(f"--reward: {name} has to see all videos at once; use one that scores a clip")
                if isinstance(reward, WinRate):
                    reward.swap = False  # both orders are asked here, and told apart
            self._rewards = rewards
        return self._rewards

    def _answered(self, questions: Mapping[str, Question]) -> Iterator[tuple[str, Answer]]:
        """Read and ask call after call; while one is asked, the videos of the next are read."""
        calls = []
        for compares in (False, True):
            keys = [key for key, question in questions.items() if question.compares == compares]
            calls += [keys[start : start + self.batch] for start in range(0, len(keys), self.batch)]

        def read(call: list[str]) -> dict[str, list[list[Clip]] | RewardError]:
            files: Read = {}
            found: dict[str, list[list[Clip]] | RewardError] = {}
            for key in call:
                try:
                    found[key] = read_clips(questions[key], files)
                except RewardError as error:
                    found[key] = error
            return found

        for found in ahead(read, calls):
            clips = {key: segments for key, segments in found.items() if not isinstance(segments, RewardError)}
            answers = {key: Answer({}, one_line(error)) for key, error in found.items() if key not in clips}
            if clips:
                compares = questions[next(iter(clips))].compares
                rewards = {n: r for n, r in self._rewards.items() if (r.scope == "group") == compares}
                answers |= zip(clips, answers_of(rewards, list(clips.values())), strict=True)
            yield from answers.items()

    def _check_columns(self, numbers: Numbers) -> None:
        for column in self.needed:
            name = column.partition("/")[0]
            if name in numbers and column not in numbers:
                own = [other for other in numbers if other.partition("/")[0] == name]
                raise UserError(f"reward {name} has no score {column}; it has {', '.join(own)}")

    def _progress(self, total: int) -> Progress:
        columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
        bar = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        bar.add_task("", total=total)
        return bar

    def _show(self, bar: Progress, question: Question, answer: Answer) -> None:
        task = bar.tasks[0]
        bar.update(task.id, advance=1, description=str(question))
        done = f"[{task.completed:g}/{task.total:g}] {question}"
        if answer.error:
            self.console.print(f"{done}  {answer.error}")
        elif not self.console.is_terminal:
            own = {name: answer.numbers[name] for name in self.names if name in answer.numbers}
            words = [f"{name} {_in_words(by_segment)}" for name, by_segment in own.items()]
            self.console.print("  ".join([done, *words]))


def _in_words(by_segment: list[list[float]]) -> str:
    """0.1 of a video, 0.1:0.2 of two, with a comma between segments."""
    return ", ".join(":".join(f"{value:.4f}" for value in values) for values in by_segment)
