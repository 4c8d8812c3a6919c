"""The command: python -m alignment.annotate INDEX --reward [NAME=]USE[:key=value,...] --out PAIRS.jsonl

  python -m alignment.annotate candidates/index.jsonl --reward sprite_motion --out pairs.jsonl
  python -m alignment.annotate guided/index.jsonl --reward judge=vlm_pairwise:style=think,url=http://... --segments 1 \\
      --out dense.jsonl

INDEX is what alignment.generate writes, or any other file of groups or pairs (.jsonl, or VideoAlign's .csv); labels in
it are made anew. Rewards that compare videos are asked in both orders, and it is a tie where these disagree; of a group
they compare every two. The mean of the rewards decides, unless --score names one; the reward `weighted` takes weights.

Exit codes: 0 done, 1 stopped on the way, 2 bad input, all of it listed. The same command goes on, and asks nothing for
other labels: answers stay in PAIRS.jsonl.answers.jsonl. PAIRS.jsonl.summary.json holds what is said at the end.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rewards.arguments import above_zero

from .errors import exit_code


def main(arguments: list[str] | None = None) -> int:
    _, more = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m alignment.annotate",
        description="Label pairs of videos, or pairs made of groups, with rewards.",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("index", type=Path, metavar="INDEX")
    add("--reward", action="append", required=True, metavar="[NAME=]USE[:key=value,...]", help="one or several times")
    add("--out", type=Path, required=True, metavar="PAIRS.jsonl")
    add("--segments", type=above_zero(float), metavar="SECONDS", help="label segments; the pair's label is their vote")
    add("--score", default="mean", help="what decides: a reward, reward/dimension, or the mean of the rewards (mean)")
    ties = parser.add_mutually_exclusive_group()
    ties.add_argument("--tie-eps", type=float, default=0.0, metavar="X", help="a difference up to X is a tie (0)")
    ties.add_argument("--btt", action="store_true", help="VideoReward's band of ties: up to 1.526, in raw scores")
    add("--select", choices=("best_worst", "all", "pareto"), default="best_worst", help="the pairs of a group")
    add("--tolerance", type=above_zero(float), metavar="X", help="of pareto: by which other scores may differ")
    add("--emphasis", metavar="NAME", help="of pareto: the score in which a winner of its front has to be better")
    add("--batch", type=above_zero(int), default=4, help="videos, or comparisons, a call (4)")
    add("--skip-failed", action="store_true", help="leave out what a reward gave no number for")
    add("--no-probes", action="store_true", help="ask nothing about still videos and exchanged pairs")
    options = parser.parse_args(arguments)
    from rewards.scoring.asking import RewardFailed

    from .annotation.command import annotate

    return exit_code(lambda: annotate(options), stops=(RewardFailed, OSError))


if __name__ == "__main__":
    sys.exit(main())
