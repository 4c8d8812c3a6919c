"""The text around the special tokens that scores are read at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rewards.qwen2_vl_reader import read_prompt
from rewards.video_reward import TOKEN

BLIND = ("VQ", "MQ")  # dimensions that do not depend on the prompt, if they come first
NAMES = {"VQ": "Visual quality", "MQ": "Motion quality", "TA": "Text alignment"}


def read_template(path: str | None, dimensions: Sequence[str]) -> str:
    """The file's text, or `default_template`. Raises: RewardError, one line."""
    if path is None:
        return default_template(dimensions)
    tokens = [TOKEN.format(name) for name in dimensions]
    return read_prompt("reward_model", Path(path).expanduser(), tokens, "VideoAlign/prompt_template.py")


def default_template(dimensions: Sequence[str]) -> str:
    """A line for each dimension, in order; the prompt comes after the dimensions that do not depend on it.

    The model is causal: what stands before the prompt cannot see it, as in VideoReward's own template.
    """
    blind = next((i for i, name in enumerate(dimensions) if name not in BLIND), len(dimensions))
    lines = [f"{NAMES.get(name, name)}: {TOKEN.format(name)}" for name in dimensions]
    lines.insert(blind, "It should show: {text_prompt}")
    return "\n".join(["\nRate the video.", *lines, ""])
