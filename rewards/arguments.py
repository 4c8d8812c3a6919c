"""Rewards on a command line: `[NAME=]use[:key=value,...]`, for `python -m rewards.serve` and `python -m rewards.score`.

clip:path=checkpoints/clip,frames=4      a known name and its options
calm=my_reward.py:calm:limit=0.1         a callable of one's own, under the name calm
remote:url=http://127.0.0.1:8000,name=clip
mean=weighted:rewards={a: sprite_motion, b: {use: clip, options: {path: checkpoints/clip}}}
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rewards.contract import RewardError, one_line

KEY = r"[A-Za-z_]\w*="
ARGUMENT = re.compile(rf"(?:(?P<name>[A-Za-z_][\w.-]*)=)?(?P<use>[^=]+?)(?::(?P<options>{KEY}.*))?", re.DOTALL)


class RewardArgument(NamedTuple):
    """One reward as it was asked for; `rewards.load(use, **options)` builds it."""

    name: str
    use: str
    options: dict[str, Any]


def parse_reward(text: str) -> RewardArgument:
    """Read `[NAME=]use[:key=value,...]`.

    The name is by default the last part of `use`. The options begin at the first `:key=`, and each ends where a comma
    and the next `key=` follow, so that values may hold colons and commas: `path=hf-hub:owner/name`, `weights=[1,2]`.
    Values are typed as in a recipe: `frames=4` is a number, `frames=null` is None, `name="4"` is a string.

    Raises: RewardError, one line.
    """
    match = ARGUMENT.fullmatch(text.strip())
    if not match:
        raise RewardError(f"--reward {text}: expected [NAME=]use[:key=value,...], as in clip:path=folder,frames=4")
    name, use = match["name"] or match["use"].rpartition(":")[2], match["use"]
    options: dict[str, Any] = {}
    for pair in re.split(rf",(?={KEY})", match["options"]) if match["options"] else ():
        key, _, value = pair.partition("=")
        if key in options:
            raise RewardError(f"--reward {text}: {key} is given twice")
        options[key] = _typed(value, f"--reward {text}: {key}")
    return RewardArgument(name, use, options)


def parse_rewards(texts: Sequence[str]) -> dict[str, RewardArgument]:
    """Read several arguments: name -> reward. Raises: RewardError where one cannot be read or a name is taken."""
    found: dict[str, RewardArgument] = {}
    for text in texts:
        argument = parse_reward(text)
        if argument.name in found:
            raise RewardError(f"--reward {text}: the name {argument.name} is taken; give another: NAME={argument.use}")
        found[argument.name] = argument
    return found


def above_zero(kind: type[int] | type[float]) -> Callable[[str], float]:
    """A reader of numbers above 0, for argparse."""

    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
        return value

    number.__name__ = f"positive {kind.__name__}"  # argparse names it where the text is no number
    return number


def _typed(value: str, where: str) -> Any:
    try:
        typed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={value}"]), resolve=False)
    except (yaml.YAMLError, ValueError, OmegaConfBaseException) as error:
        reason = one_line(error)
        raise RewardError(f"{where}: {value!r} is not a YAML value ({reason}); quote it") from error
    return typed["value"]
