"""The blocks of a denoiser and the hidden states between them, without any model's own code.

B batch, N tokens, W width
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import UserError

STATES = "hidden_states"


class Reached(Exception):
    """Leaves a denoiser, and the pipeline around it, with the hidden states before a block."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden


def blocks_of(denoiser: nn.Module) -> dict[str, nn.Module]:
    """The denoiser's blocks by name, in the order in which they run.

    They are the longest list of modules in it, after those that are listed before and see the text as well, as blocks
    of two streams do; what refines the text alone is none.
    """
    lists = {name: part for name, part in denoiser.named_children() if isinstance(part, nn.ModuleList) and len(part)}
    if not lists:
        raise UserError(f"algorithm.layer: {type(denoiser).__name__} is no stack of blocks; use a video transformer")
    longest = max(reversed(lists), key=lambda name: len(lists[name]))  # of equals the last
    names = list(lists)
    names = [n for n in names[: names.index(longest)] if _sees_text(lists[n][0])] + [longest]
    return {f"{name}.{i}": block for name in names for i, block in enumerate(lists[name])}


def width_of(block: nn.Module) -> int:
    """W of the hidden states that a block takes: what most of its linear layers do."""
    return Counter(m.in_features for m in block.modules() if isinstance(m, nn.Linear)).most_common(1)[0][0]


def check_layer(denoiser: nn.Module, layer: int) -> None:
    """Raises: UserError where there is nothing behind this many blocks but the denoiser's output."""
    count = len(blocks_of(denoiser))
    if not 1 <= layer < count:
        raise UserError(
            f"algorithm.layer: {layer} is not between 1 and {count - 1}; {type(denoiser).__name__} has {count} blocks, "
            "and a reward reads what the first of them hand on"
        )


def leave(block: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Hook before a block that raises `Reached` with its (B, N, W) hidden states."""
    given = inspect.signature(block.forward).bind_partial(*args, **kwargs).arguments
    states = given[STATES] if STATES in given else next(iter(given.values()))
    raise Reached(states.flatten(1, -2))


def _sees_text(block: nn.Module) -> bool:
    return "encoder_hidden_states" in inspect.signature(block.forward).parameters
