"""The command: python -m alignment.generate RECIPE --out FOLDER [--candidates N | --guided VIDEOS] [key=value ...]

Candidates: N videos for each of the recipe's prompts, sampled as the recipe says. Guided pairs (DenseDPO, arXiv
2506.03517): each real video is noised to one level with two noises and denoised twice, so that the two move alike.

FOLDER gets videos/, latents/ (the clean states, and the noise that each was made from) and index.jsonl, which
`python -m alignment.annotate` labels. What is there already is not made again, so an interrupted call goes on; with
accelerate launch several processes share the work. Exit codes: 0 done, 1 stopped on the way, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from .errors import TrainingStopped, UserError, exit_code


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alignment.generate", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML file: its model, call, sampler, data.prompts, seed, fps and batch count")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. sampler.steps=30")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    add = parser.add_argument
    add("--candidates", type=int, default=4, metavar="N", help="videos a prompt (default 4)")
    add("--guided", type=Path, metavar="VIDEOS", help="real videos: a folder with a prompts file, or a preference file")
    start = "share of noise that a guided pair starts from, drawn once a pair (default 0.65 0.8)"
    add("--eta", type=float, nargs=2, default=[0.65, 0.8], metavar=("LOW", "HIGH"), help=start)
    add("--eta-space", choices=["sigma", "index"], default="sigma", help="what eta counts: noise (default) or steps")
    add("--pairs", type=int, default=1, metavar="N", help="guided pairs a video (default 1)")
    add("--weights", type=Path, metavar="RUN", help="a run folder whose newest weights sample; default: the base model")
    options = parser.parse_intermixed_args(arguments)
    return exit_code(lambda: generate(options))


def generate(options: argparse.Namespace) -> int:
    """Check everything, then make what is missing."""
    from .config import load_recipe

    check_options(options)
    recipe = load_recipe(options.recipe, options.overrides)
    from .check import check_sampling
    from .data import check_media, read_preferences
    from .distributed import Processes
    from .generation import generate_all
    from .startup import explained

    processes = Processes(cpu=recipe.model.device == "cpu")
    check_sampling(recipe)
    if options.guided:
        check_media(read_preferences(options.guided, "--guided"), "--guided")
    try:
        generate_all(recipe, options, processes)
    except (OSError, RuntimeError) as error:
        if reason := explained(error):
            raise TrainingStopped(reason) from error
        raise
    finally:
        processes.close()
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raises: UserError for the first option that cannot be."""
    low, high = options.eta
    if not 0 < low <= high <= 1:
        raise UserError(f"--eta: {low:g} {high:g} is not LOW HIGH with 0 < LOW <= HIGH <= 1")
    if options.candidates < 1 or options.pairs < 1:
        raise UserError("--candidates and --pairs: are 1 or more")
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out: {options.out} is a file")


if __name__ == "__main__":
    sys.exit(main())
