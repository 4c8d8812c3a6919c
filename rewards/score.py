"""The command: python -m rewards.score --reward [NAME=]USE[:key=value,...] --videos DIR|FILE|CSV|JSONL [--out FILE]

  python -m rewards.score --reward sprite_motion --videos a.mp4 --prompts "a red circle moving left"
  python -m rewards.score --reward clip:path=my_clip --reward calm=my_reward.py:calm --videos clips.csv --out scores.csv

Exit codes: 0 every video has every score, 1 some have not or the run was stopped, 2 bad input, all of it listed.
With --out the same command goes on where it was, and tries again what failed. An output belongs to one set of rewards
and videos (more may be added); with others it is refused. A table (.csv, .parquet) is written at the end; what it is
written from, FILE.partial.jsonl, stays beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rewards.arguments import above_zero
from rewards.scoring.command import BadInput, Stopped, score


def main(arguments: list[str] | None = None) -> int:
    _, examples = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m rewards.score",
        description="Score videos with one reward or several.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--reward", action="append", required=True, metavar="[NAME=]USE[:key=value,...]", help="one or several times")
    add("--videos", required=True, help="a video or image, a folder, or a .csv or .jsonl table (path, prompt[, fps])")
    add("--prompts", help="one prompt, a .txt with a line a video, or a table (path, prompt)")
    add("--prompts-from-names", action="store_true", help="a video without a prompt is described by its file's name")
    add("--out", type=Path, help="scores.jsonl, .csv or .parquet; without it, scores are only shown")
    add("--batch", type=above_zero(int), default=1, help="clips a call (1); rewards that compare see all of a prompt")
    add("--fps", type=above_zero(float), help="the rate to believe where the table gives none, instead of the files'")
    add("--max-pixels", type=above_zero(int), help="the most that all frames of a video may have together (2**29)")
    add("--dense", action="store_true", help="scores of frames or segments, too (.jsonl only)")
    options = parser.parse_args(arguments)
    try:
        return score(options)
    except BadInput as error:
        print("\n".join(f"error: {line}" for line in error.problems), file=sys.stderr)
        return 2
    except (Stopped, KeyboardInterrupt) as error:
        reason = str(error) or "interrupted"
        print(f"stopped: {reason}" + ("; the same command goes on" if options.out else ""), file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
