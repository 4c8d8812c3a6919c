"""The command: python -m alignment.run RECIPE [key=value ...] [--check] [--resume]

Exit codes: 0 done, 1 stopped on the way with the state saved, 2 bad input (one line says which and how to mend it).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import TrainingStopped, UserError

if TYPE_CHECKING:
    from types import ModuleType

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
    # Heavy imports wait until here, so that --help answers at once.
    from rewards import RewardError

    try:
        return run(options.recipe, options.overrides, options.check, options.resume)
    except (UserError, RewardError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"stopped: {_one_line(error)}", file=sys.stderr)
        return 1


def run(path: str, overrides: list[str], check_only: bool = False, resume: bool = False) -> int:
    """Load, check and, unless `check_only`, train a recipe."""
    from .check import check_recipe
    from .config import load_recipe
    from .distributed import Processes

    recipe = load_recipe(path, overrides)
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
    """A run that is ready to train: policy loaded and self-checked, prompts embedded, state restored."""
    from .check import check_disk
    from .policy import load_policy
    from .scoring import Scorer
    from .self_check import self_check
    from .training import Run

    scorer = Scorer(recipe, processes.device)
    policy = load_policy(recipe.model, recipe.sampler, recipe.call, processes.device)
    check_disk(recipe.folder, sum(p.numel() for p in policy.parameters.values()), recipe)
    if _algorithm(recipe).needs_reference(recipe.algorithm):
        policy.keep_reference()
    session = Run(recipe, policy, scorer, processes)
    policy.cache_embeddings(Path(recipe.model.embeddings or recipe.folder / "embeddings"))
    self_check(policy, session.stream.prompts[0].text)
    if recipe.model.drop_encoders:
        policy.release_encoders([p.text for p in [*session.stream.prompts, *session.evaluation_prompts]])
    if resume and not session.resume():
        session.display.say(f"{recipe.folder} holds no checkpoint yet: starting from the beginning")
    return session


def train(session: Run) -> None:
    """Run the recipe's algorithm; however it ends, the last state is saved and the report written."""
    from .config import save_recipe
    from .report import write_report
    from .versions import versions

    recipe = session.recipe
    if session.processes.is_main:
        save_recipe(recipe, recipe.folder / "config.yaml", versions())
    session.open()
    try:
        _algorithm(recipe).train(session)
    except BaseException as error:
        if session.iteration > session.completed:
            session.save()
        if isinstance(error, OSError):
            raise TrainingStopped(f"{error}; mend that, then --resume") from error
        raise
    finally:
        if session.processes.is_main:
            session.display.say(f"report: {write_report(recipe.folder)}")


def _algorithm(recipe: Recipe) -> ModuleType:
    """The file that the recipe's algorithm lives in."""
    return sys.modules[type(recipe.algorithm).__module__]


def _claim_folder(recipe: Recipe, resume: bool) -> None:
    """An occupied run folder is never written into unless the run is resumed."""
    folder = recipe.folder
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output: {folder} is a file")
    if folder.is_dir() and any(folder.iterdir()) and not resume:
        raise UserError(
            f"output: {folder} already holds a run; add --resume to go on, or output=... for another folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: cannot create {folder}: {error.strerror}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
