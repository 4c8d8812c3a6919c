"""The judges of a comparison, and which of them each tuned model knows from its training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from alignment.config import Recipe
from alignment.errors import Problems
from rewards import RewardError, check
from rewards.arguments import RewardArgument, parse_rewards
from rewards.loading import MADE_OF

from .models import BASE, Contender

TRAINED, SELECTED, RELATED, INDEPENDENT, UNKNOWN = "trained on", "selected by", "related", "independent", "unknown"
PEOPLE = "people"  # the name of the judge that votes make


def read_judges(texts: Sequence[str], taken: Sequence[str] = (PEOPLE, "measures")) -> dict[str, RewardArgument]:
    """Judges by name, known to be loadable. Raises: Problems with all that is wrong, a line each."""
    try:
        asked = parse_rewards(texts)
    except RewardError as error:
        raise Problems([str(error).replace("--reward", "--judge")]) from error
    problems = [f"--judge: the name {name} is taken; give another: NAME=..." for name in asked if name in taken]
    for name, judge in asked.items():
        try:
            check(judge.use, **judge.options)
        except RewardError as error:
            problems.append(f"--judge {name}: {error}")
    if problems:
        raise Problems(problems)
    return asked


def relation(judge: RewardArgument, model: Contender) -> str:
    """What a judge is to a tuned model.

    "trained on": a reward of the run's config.yaml with a weight, or a part of one, with the same options.
    "selected by": one without a weight whose peak the saved weights are.
    "related": by the same name, with other options, as another number of frames.
    "unknown": the model is no run, and says nothing of its training.
    """
    if model.run is None:
        return UNKNOWN
    recipe = model.recipe
    known = {TRAINED: list(recipe.trained_rewards), SELECTED: _selecting(recipe)}
    own = list(_parts({"use": judge.use, "options": judge.options}))
    found = {how: [p for name in names for p in _parts(vars(recipe.rewards[name]))] for how, names in known.items()}
    for how, parts in found.items():
        if any(part in parts for part in own):
            return how
    uses = {use for parts in found.values() for use, _ in parts} - MADE_OF.keys()
    return RELATED if any(use in uses for use, _ in own) else INDEPENDENT


def _selecting(recipe: Recipe) -> list[str]:
    watch = recipe.evaluation.watch
    return [watch] if recipe.evaluation.patience and watch in recipe.rewards else []


def _parts(reward: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A reward and, where it is made of others, these: (use, options), paths absolute."""
    use, options = _plain(reward["use"]), dict(reward.get("options") or {})
    yield use, _plain(options)
    if use in MADE_OF:
        parts = options.get(MADE_OF[use])
        for part in parts.values() if use == "weighted" and isinstance(parts, Mapping) else [parts]:
            part = {"use": part} if isinstance(part, str) else part
            if isinstance(part, Mapping) and "use" in part:
                yield from _parts(part)


def _plain(value: Any) -> Any:
    """The same with the paths of files and folders in one form."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        file, colon, attribute = value.partition(".py:")
        if colon and Path(f"{file}.py").is_file():
            return f"{Path(f'{file}.py').resolve()}:{attribute}"
        return str(Path(value).resolve()) if value and Path(value).exists() else value
    return value


def relations(judges: Mapping[str, RewardArgument], models: Sequence[Contender]) -> dict[str, dict[str, str]]:
    """Tuned model -> judge -> relation. People, who were not asked in training, are independent."""
    return {
        model.name: {name: relation(judge, model) for name, judge in judges.items()} | {PEOPLE: INDEPENDENT}
        for model in models
        if model.name != BASE
    }
