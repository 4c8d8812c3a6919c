"""A recipe's settings as advice names them: where they stand, and what they are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def setting(config: Mapping[str, Any], *names: str, default: str) -> str:
    """`algorithm.clip (now 0.001)` for the first of the names that the recipe has, else the default words.

    Args:
        names: keys, or the ends of their paths (`window.size`).
    """
    for name in names:
        for path, value in _leaves(config).items():
            if f".{path}".endswith(f".{name}"):
                return f"`{path}` (now {value})"
    return default


def value_of(config: Mapping[str, Any], *names: str) -> Any:
    """The value of the same setting; None where the recipe has none of them."""
    leaves = _leaves(config)
    return next((v for name in names for path, v in leaves.items() if f".{path}".endswith(f".{name}")), None)


def more_kl(config: Mapping[str, Any]) -> str:
    """What holds the policy nearer to its start: `raise `algorithm.kl` (now 0.0)`, or beta where pairs are compared."""
    found = setting(config, "kl", "beta", default="")
    return f"raise {found}" if found else "add a KL penalty"


def given_labels(config: Mapping[str, Any]) -> str | None:
    """The file of preferences that a run learns from, so that rewards are asked by its evaluations alone, or None."""
    return value_of(config, "data.preferences")


def reward_words(config: Mapping[str, Any]) -> str:
    """`trained reward`, or `reward` where nothing was trained on it."""
    return "reward" if given_labels(config) else "trained reward"


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Path -> value; what belongs to a reward or says which versions ran is no setting of the training."""
    leaves = {}
    for key, value in config.items():
        path = f"{prefix}{key}"
        if path in ("rewards", "versions"):
            continue
        leaves |= _leaves(value, f"{path}.") if isinstance(value, Mapping) and value else {path: value}
    return leaves
