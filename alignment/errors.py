"""Errors that are the user's to mend: one line that names the file, the key and the fix; never a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence


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


def exit_code(
    work: Callable[[], int | None],
    stops: tuple[type[Exception], ...] = (TrainingStopped,),
    interrupted: str = "interrupted",
    goes_on: str = "; the same command goes on",
) -> int:
    """Do the work of a command; what is the user's to mend is told in lines, never in a traceback.

    Args:
        stops: what ends the work on its way, besides an interruption.
        interrupted, goes_on: what is said of an interruption, and behind that or the reason for a stop.
    Returns: what `work` returns, or 0; 2 after a UserError, 1 where it was stopped.
    """
    try:
        return work() or 0
    except UserError as error:
        lines = error.lines if isinstance(error, Problems) else [in_one_line(error)]
        print("\n".join(f"error: {line}" for line in lines), file=sys.stderr)
        return 2
    except (*stops, KeyboardInterrupt) as error:
        print(f"stopped: {in_one_line(error) or interrupted}{goes_on}", file=sys.stderr)
        return 1
