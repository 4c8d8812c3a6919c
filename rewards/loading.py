"""From the name in a recipe to a reward: a known name, `package.module:callable` or `path/to/file.py:callable`."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from rewards.contract import LiftedFunction, Reward, RewardError, is_reward, lift, one_line
from rewards.known import KNOWN

# Known rewards that are made of others, and the option that names these.
MADE_OF = {"aspects": "reward", "per_frame": "image_reward", "weighted": "rewards", "win_rate": "judge"}


def load(use: str, /, **options: Any) -> Reward:
    """Build the reward that `use` names.

    `use` is a key of KNOWN, `package.module:callable` or `path/to/file.py:callable`. What it points at decides:
    - a class, or a known name, is called with the options and gives the reward (or a callable to lift);
    - an object that is a reward already (name, scope, differentiable) is taken as it is, without options;
    - any other callable is a plain `f(videos, prompts, **options)`: the options are bound, the rest is `lift`'s. It is
      differentiable if it carries a true attribute `differentiable`.

    Rewards made of others name them as a recipe does, by `use` alone or as {use: ..., options: {...}}:

        load("win_rate", judge={"use": "clip", "options": {"path": "folder"}})
        load("weighted", rewards={"colour": "sprite_colour", "motion": "sprite_motion"})

    Raises: RewardError, one line: unknown name, module that does not import, missing attribute, wrong option.
    """
    target = _checked(use, options)
    if use in KNOWN:
        check(use, **options)  # what can be refused is, before any weights are read
    if use in MADE_OF:
        options = _with_parts(use, options, load)
    if is_reward(target) and not inspect.isclass(target):
        return lift(target)
    name = use.rpartition(":")[2]
    if use in KNOWN or inspect.isclass(target):
        built = target(**options)
        if not callable(built):
            raise RewardError(f"reward {use}: gives a {type(built).__name__}, which cannot be called with clips")
        return lift(built, name)
    return LiftedFunction(functools.partial(target, **options), name, bool(getattr(target, "differentiable", False)))


def check(use: str, /, **options: Any) -> None:
    """Refuse what `load` would refuse, without building the reward: no weights are read.

    A class with a `check(**options)` of its own is asked too (CLIPReward looks whether its files exist), and so are the
    rewards that one is made of.

    Raises: RewardError as `load` does.
    """
    target = _checked(use, options)
    if hasattr(target, "check") and (inspect.isclass(target) or use in MADE_OF):
        try:
            if use in KNOWN and options.get("device"):
                torch.device(options["device"])
            target.check(**options)
        except RewardError:
            raise
        except (TypeError, ValueError, AttributeError, OSError, RuntimeError) as error:
            given = ", ".join(f"{option}={value!r:.60}" for option, value in options.items())
            reason = one_line(error)
            raise RewardError(f"reward {use}: cannot take {given} ({reason})") from error
    if use in MADE_OF:
        _with_parts(use, options, check)


def _with_parts(use: str, options: dict[str, Any], make: Callable[..., Any]) -> dict[str, Any]:
    """The options, in which `make(use, **options)` takes the place of each reward that they name."""
    option = MADE_OF[use]
    parts = options[option]
    if use != "weighted":
        return options | {option: _part(use, option, parts, make)}
    return options | {option: {name: _part(use, f"{option}.{name}", part, make) for name, part in parts.items()}}


def _part(use: str, where: str, part: Any, make: Callable[..., Any]) -> Any:
    if callable(part):  # a reward, or what becomes one
        return part
    part = {"use": part} if isinstance(part, str) else part
    options = part.get("options", {}) if isinstance(part, Mapping) else None
    if not isinstance(options, Mapping) or not isinstance(part.get("use"), str) or part.keys() - {"use", "options"}:
        raise RewardError(f"reward {use}: {where} is {part!r}, expected a name, or {{use: ..., options: {{...}}}}")
    return make(part["use"], **options)


def _checked(use: str, options: dict[str, Any]) -> Any:
    """Return what `use` names, once it is known to take the options."""
    target = _resolve(use)
    if not callable(target):
        raise RewardError(f"reward {use}: is of type {type(target).__name__}, expected a class or a function")
    if use in KNOWN or inspect.isclass(target):
        _check_options(use, target, (), options)
    elif is_reward(target):
        if options:
            raise RewardError(f"reward {use}: is an object already, so it takes no options, got {', '.join(options)}")
    else:
        _check_options(use, target, ("videos", "prompts"), options)
    return target


def _resolve(use: str) -> Any:
    where = KNOWN[use].target if use in KNOWN else use
    module_name, colon, attribute = where.rpartition(":")
    if not colon:
        raise RewardError(
            f"reward {use}: unknown name{_nearest(use, KNOWN)}; known: {', '.join(KNOWN)}; "
            "a reward of your own is package.module:callable or path/to/file.py:callable"
        )
    if not module_name or not attribute:
        raise RewardError(f"reward {use}: expected package.module:callable or path/to/file.py:callable")
    module = _import_file(use, Path(module_name)) if module_name.endswith(".py") else _import(use, module_name)
    if not hasattr(module, attribute):
        names = [name for name in vars(module) if not name.startswith("_")]
        raise RewardError(f"reward {use}: {module_name} has no {attribute}{_nearest(attribute, names)}")
    return getattr(module, attribute)


def _import(use: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except Exception as error:  # a user's module may raise anything, and all of it means the same
        raise _import_error(use, name, error) from error


def _import_file(use: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"reward {use}: no file {path} (looked for {path.resolve()})")
    # A name of its own, so that two files called my_reward.py do not become one module.
    digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"reward_file_{path.stem}_{digest}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look a module up by name
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # as above
        del sys.modules[spec.name]
        raise _import_error(use, str(path), error) from error
    return module


def _import_error(use: str, where: str, error: Exception) -> RewardError:
    reason = one_line(error)
    return RewardError(f"reward {use}: {where} does not import: {type(error).__name__}: {reason}")


def _check_options(use: str, target: Callable, leading: tuple[str, ...], options: dict[str, Any]) -> None:
    """Bind the call that will be made: `leading` values, then the options by name."""
    try:
        signature = inspect.signature(target)
    except ValueError as error:
        raise RewardError(f"reward {use}: has no readable signature; wrap it in a function of your own") from error
    named = [p.name for p in signature.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    taken = named[len(leading) :]
    for option in options:
        if option not in taken and not takes_any:
            listed = f"; options: {', '.join(taken)}" if taken else "; it takes none"
            raise RewardError(f"reward {use}: no option {option!r}{_nearest(option, taken)}{listed}")
    try:
        signature.bind(*leading, **options)
    except TypeError as error:
        form = f"f({', '.join(leading)}, **options)" if leading else "its options"
        hint = "; a reward built from options is written as a class" if leading else ""
        raise RewardError(f"reward {use}: cannot be called with {form}: {error}{hint}") from error


def _nearest(word: str, words: Iterable[str]) -> str:
    match = get_close_matches(word, list(words), n=1)
    return f" (did you mean {match[0]!r}?)" if match else ""
