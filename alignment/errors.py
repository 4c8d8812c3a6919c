"""Errors that are the user's to mend: one line that names the file, the key and the fix; never a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Bad input, found before expensive work. The command prints it and exits with code 2."""


class Problems(UserError):
    """All that is wrong with a file, one line each: many of thousands of rows are mended in one go."""

    SHOWN = 20

    def __init__(self, problems: Sequence[str]):
        more = [f"and {len(problems) - self.SHOWN} more"] if len(problems) > self.SHOWN else []
        self.lines = [*problems[: self.SHOWN], *more]
        super().__init__("\n".join(self.lines))


class TrainingStopped(Exception):
    """A run that cannot go on. Its state is saved; the command prints the reason and exits with code 1."""


def one_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def in_one_line(error: BaseException) -> str:
    """All of a message, in one line."""
    return " ".join(str(error).split())
