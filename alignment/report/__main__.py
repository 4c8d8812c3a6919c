"""`python -m alignment.report RUN_FOLDER` writes the folder's report.html again."""

import sys
from collections.abc import Sequence
from pathlib import Path

from . import write_report


def main(arguments: Sequence[str]) -> int:
    """The command; returns its exit code."""
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m alignment.report RUN_FOLDER", file=sys.stderr)
        return 0 if arguments in (["-h"], ["--help"]) else 2
    try:
        print(write_report(Path(arguments[0])))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
