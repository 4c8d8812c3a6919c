"""How often a reward agrees with people: the benchmark of reward models on preference data.

  python -m benchmarks.reward_accuracy --data videogen-rewardbench.csv --reward video_reward --out runs/rewardbench
  python -m benchmarks.reward_accuracy --data pairs.jsonl --reward sprite_motion --reward calm=mine.py:calm
  accelerate launch -m benchmarks.reward_accuracy ...      shares the scoring between processes

Layouts that are recognised: VideoGen-RewardBench, other tables of VideoAlign's, GenAI-Bench (video), MJ-Bench-Video,
HPDv2, ImageReward, and our own pairs and groups. Scores are kept in --cache, so that the same command goes on where it
was stopped and another benchmark uses what is there. See benchmarks/README.md for what the figures mean.

Exit codes: 0 done, 1 stopped, 2 bad input, all of it listed.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from alignment.errors import TrainingStopped, UserError, exit_code


def main(arguments: Sequence[str] | None = None) -> int:
    from benchmarks.accuracy.layouts import FORMATS
    from benchmarks.accuracy.protocols import TIES
    from rewards.arguments import above_zero

    title, epilog = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reward_accuracy",
        description=title,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, required=True, help="preference data: .csv, .json, .jsonl or .parquet")
    add("--reward", action="append", required=True, metavar="[NAME=]USE[:key=value,...]", help="one or several times")
    add("--format", choices=list(FORMATS), metavar="NAME", help=f"{', '.join(FORMATS)}; default: what the columns say")
    add("--media", type=Path, help="folder where the names of videos and images begin; default: that of --data")
    add("--allow-missing", action="store_true", help="score the pairs whose media are there, and say what share it is")
    add("--ties", choices=TIES, default="realisable", help="how accuracy with ties is counted (realisable)")
    add("--out", type=Path, help="folder for accuracy.json, margins.jsonl, accuracy.html, accuracy.png")
    add("--cache", type=Path, default=Path("runs/reward_scores"), help="folder of kept scores (runs/reward_scores)")
    add("--batch", type=above_zero(int), default=1, help="clips, or pairs, a call (1)")
    add("--max-failed", type=_share, default=0.05, help="share of media that may fail to be scored (0.05)")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    command = f"python -m benchmarks.reward_accuracy {shlex.join(given)}"
    return exit_code(lambda: run(options, command))


def run(options: argparse.Namespace, command: str) -> int:
    """Check everything, score what is not scored yet, count, and write. Raises: UserError, TrainingStopped."""
    import torch
    from rich.console import Console

    from alignment.distributed import Processes
    from benchmarks.accuracy.output import Outcome, ranking
    from benchmarks.accuracy.protocols import evaluate
    from benchmarks.accuracy.readers import read_benchmark
    from benchmarks.accuracy.report import write_report
    from benchmarks.accuracy.scoring import hashes, score
    from benchmarks.accuracy.terminal import show
    from benchmarks.pictures import pyplot
    from rewards.contract import RewardError
    from rewards.scoring.asking import RewardFailed

    asked = _rewards(options.reward)
    if options.out:
        pyplot()  # refuses now what would be missing in the end
    found = read_benchmark(options.data, options.format, options.media, options.allow_missing, options.cache / "media")
    processes = Processes(cpu=not torch.cuda.is_available())
    console = Console(highlight=False, markup=False, soft_wrap=True)
    contents, outcomes = hashes(found), []
    try:
        for argument in asked.values():
            scored = score(
                *(argument, found, contents, options.cache, processes, console),
                batch=options.batch,
                max_failed=options.max_failed,
            )
            outcomes.append(Outcome(scored, evaluate(found, scored.readings, options.ties)))
    except RewardError as error:
        raise UserError(str(error)) from error
    except (RewardFailed, OSError) as error:
        raise TrainingStopped(str(error)) from error
    if processes.is_main:
        show(found, ranking(outcomes), console)
        if options.out:
            write_report(options.out, found, outcomes, command, options.ties)
            console.print(f"written: {options.out}/accuracy.json, .html, .png, margins.jsonl")
    processes.close()
    return 0


def _rewards(texts: Sequence[str]) -> dict:
    """Name -> what was asked for. Raises: UserError, before any media are looked for."""
    from rewards.arguments import parse_rewards
    from rewards.contract import RewardError
    from rewards.loading import check

    try:
        asked = parse_rewards(texts)
        for argument in asked.values():
            check(argument.use, **argument.options)
    except RewardError as error:
        raise UserError(str(error)) from error
    return asked


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
