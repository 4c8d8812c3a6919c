"""Did a tuned generator get better, and would a stranger agree? Win rates of tuned models against their base.

  python -m benchmarks.win_rate --base examples/tiny_world/base --tuned runs/tiny_grpo \\
      --prompts examples/tiny_world/prompts/heldout.txt --judge motion=sprite_motion \\
      --judge clip:path=examples/tiny_world/clip --out runs/comparison
  accelerate launch -m benchmarks.win_rate ...

Every model makes a video of each prompt from the same noise, with the pipeline's own scheduler and the settings of the
run's config.yaml; judges then compare each tuned model's videos with the base's. A judge is a reward, of clips (the
higher score wins) or of pairs. Which of them the run was trained on is read off its config.yaml: what they say does not
count as a stranger's opinion.

FOLDER gets index.html, result.json, result.png, voting.html (blind, to vote on), the videos and the scores. The same
command goes on where it was stopped, to the same numbers: judged are 8-bit frames that are kept without loss. Judges
can be added to a folder; other models, prompts or settings cannot.

Exit codes: 0 done, 1 stopped on the way, 2 bad input.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from alignment.errors import UserError, exit_code
from rewards.arguments import above_zero


def parser() -> argparse.ArgumentParser:
    """The command's options."""
    first, more = __doc__.split("\n\n", 1)
    found = argparse.ArgumentParser(
        prog="python -m benchmarks.win_rate",
        description=first,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add, folder = found.add_argument, "a run folder, a diffusers folder or a hub id"
    people = "what somebody exported from voting.html: one more judge"
    add("overrides", nargs="*", metavar="key=value", help="of sampling, e.g. sampler.steps=30 or call.guidance_scale=5")
    add("--base", required=True, metavar="MODEL", help="a diffusers folder or a hub id")
    add("--tuned", action="append", required=True, metavar="[NAME=]RUN", help=f"{folder}; one or several times")
    add(
        "--prompts", required=True, metavar="SET", help="vbench, ta_hard, videogen_eval, or a .txt, .jsonl or .csv file"
    )
    add("--judge", action="append", required=True, metavar="[NAME=]USE[:key=value,...]", help="one or several times")
    add("--out", type=Path, required=True, metavar="FOLDER")
    add("--samples", type=above_zero(int), default=1, metavar="N", help="videos a prompt (1)")
    add("--limit", type=above_zero(int), metavar="N", help="take the first prompts only")
    add("--settings", metavar="RECIPE", help="a recipe that says how to sample; default: that of the first run")
    add("--tie-eps", action="append", default=[], metavar="[JUDGE=]X", help="a difference up to X is a tie (0)")
    add("--batch", type=above_zero(int), default=4, metavar="N", help="videos, or pairs, a call of a judge (4)")
    add("--flow", choices=("auto", "raft", "dis"), default="auto", help="optical flow of the dynamic degree (auto)")
    add("--votes", type=Path, action="append", default=[], metavar="FILE.json", help=people)
    add(
        "--vbench",
        action="append",
        default=[],
        metavar="MODEL=SCORES",
        help="VBench's results of a model: one more table",
    )
    return found


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_intermixed_args(arguments)
    options.command = f"python -m benchmarks.win_rate {shlex.join(arguments)}"
    from rewards.scoring.asking import RewardFailed

    return exit_code(lambda: _compare(options), stops=(RewardFailed, OSError))


def _compare(options: argparse.Namespace) -> None:
    from benchmarks.winning.command import compare_models
    from rewards import RewardError

    try:
        compare_models(options)
    except RewardError as error:
        raise UserError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
