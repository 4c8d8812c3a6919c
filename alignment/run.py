"""The command: python -m alignment.run RECIPE [key=value ...] [--check] [--resume]

Exit codes: 0 done, 1 stopped on the way with the state saved, 2 bad input (one line says which and how to mend it).
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import TrainingStopped, UserError, exit_code, in_one_line

if TYPE_CHECKING:
    from .config import Recipe
    from .distributed import Processes
    from .training import Run


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m alignment.run", description=__doc__.splitlines()[0])
    parser.add_argument("recipe", help="a YAML file, e.g. recipes/tiny_grpo.yaml, or a run folder's config.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="e.g. iterations=10 model.lora.rank=8")
    parser.add_argument("--check", action="store_true", help="validate the recipe without loading weights")
    parser.add_argument("--resume", action="store_true", help="go on from the run folder's newest checkpoint")
    options = parser.parse_intermixed_args(arguments)
    return exit_code(
        lambda: run(options.recipe, options.overrides, options.check, options.resume),
        interrupted="interrupted before training",
        goes_on="",
    )


def run(path: str, overrides: list[str], check_only: bool = False, resume: bool = False) -> int:
    """Load, check and, unless `check_only`, train a recipe."""
    # Heavy imports wait until they are needed, so that --help and typos are answered at once.
    from .config import load_recipe

    recipe = load_recipe(path, overrides)
    from .check import check_recipe
    from .distributed import Processes

    processes = Processes(cpu=recipe.model.device == "cpu")
    notes = check_recipe(recipe, processes.count)
    if check_only:
        print("\n".join([f"{path}: good", *(f"  {note}" for note in notes)]))
        return 0
    _claim_folder(recipe, resume)
    processes.wait()
    session = prepare(recipe, processes, resume)
    try:
        train(session)
    finally:
        session.close()
        processes.close()
    return 0


def prepare(recipe: Recipe, processes: Processes, resume: bool = False) -> Run:
    """A run that is ready to train: model loaded and self-checked, prompts embedded, state restored."""
    from .check import check_disk
    from .config import algorithm_of, trains_reward
    from .policy import load_policy
    from .scoring import Scorer
    from .startup import quiet_loading
    from .training import Run

    quiet_loading()
    scorer = Scorer(recipe, processes.device)
    algorithm = algorithm_of(recipe)
    own = getattr(algorithm, "load_model", None)
    policy = own(recipe, processes.device) if own else load_policy(recipe, processes.device)
    check_disk(recipe.folder, sum(p.numel() for p in policy.parameters.values()), recipe)
    if algorithm.needs_reference(recipe.algorithm) or (
        recipe.evaluation.trained_share < 1 and not trains_reward(recipe)
    ):
        policy.keep_reference()
    session = Run(recipe, policy, scorer, processes)
    if not own:
        _prepare_pipeline(session)
    if resume and not session.resume():
        session.display.say(f"{recipe.folder} holds no checkpoint yet: starting from the beginning")
    return session


def _prepare_pipeline(session: Run) -> None:
    """Check a diffusers pipeline against the recipe's prompts, embed these, and encode given videos."""
    from .check import check_images
    from .preference import MatchingConfig, look_at_pipeline
    from .startup import try_out

    recipe, policy, prompts = session.recipe, session.policy, session.stream.prompts
    check_images(type(policy.pipe), prompts, session.evaluation_prompts)
    policy.cache_embeddings(Path(recipe.model.embeddings or recipe.folder / "embeddings"))
    try_out(policy, prompts[0])
    if isinstance(recipe.algorithm, MatchingConfig):
        look_at_pipeline(policy, recipe.algorithm, prompts[0])
        session.given.prepare()
    if recipe.model.drop_encoders:
        held_out = session.given.records(recipe.data.held_out) if recipe.data.held_out else []
        every = [*prompts, *session.evaluation_prompts, *(record.prompt for record in held_out)]
        policy.release_encoders([prompt.text for prompt in every])


def train(session: Run) -> None:
    """Run the recipe's algorithm; however it ends, the last state is saved and the report written.

    Raises: UserError or TrainingStopped for what is the user's to mend, before and after the first iteration; anything
        else is a fault of this program and keeps its traceback.
    """
    from rewards import RewardError

    from .config import algorithm_of
    from .startup import explained

    recipe = session.recipe
    try:
        if session.completed >= recipe.iterations:
            session.display.say(f"all {recipe.iterations} iterations are done; iterations=... goes further")
        algorithm_of(recipe).train(session)
    except BaseException as error:
        started = session.iteration > 0 or session.completed > 0
        if started:
            _rescue(session)
        if isinstance(error, (RewardError, TrainingStopped)):  # all processes raise these together
            session.processes.wait()  # a launcher that sees one end would end the one that still saves
        if isinstance(error, KeyboardInterrupt):
            raise TrainingStopped("interrupted; --resume goes on") from error
        if reason := explained(error):
            raise (TrainingStopped if started else UserError)(f"{reason}; once mended, --resume goes on") from error
        raise
    _report(session)


def _rescue(session: Run) -> None:
    """Save and report after a failure. What fails here too is told, and never hides the failure itself."""
    for what, write in (("state", session.save), ("report", lambda: _report(session))):
        try:
            write()
        except Exception as error:
            session.display.say(f"{what} not saved: {in_one_line(error)}")


def _report(session: Run) -> None:
    from .report import write_report

    if session.processes.is_main:
        session.display.say(f"report: {write_report(session.folder)}")


def _claim_folder(recipe: Recipe, resume: bool) -> None:
    """An occupied run folder is never written into unless the run is resumed."""
    folder = recipe.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file")
    # A run that was refused before it began leaves embedded prompts and prepared videos at most.
    prepared = ("embeddings", "latents", "frames")
    if not resume and folder.is_dir() and any(path.name not in prepared for path in folder.iterdir()):
        raise UserError(
            f"output: {folder} already holds a run; add --resume to go on, or output=... for another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot create {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"output: {folder} cannot be written to")


if __name__ == "__main__":
    sys.exit(main())
