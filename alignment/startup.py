"""The first time that a pipeline runs with a recipe's arguments, and what its failures mean to the user."""

from __future__ import annotations

import sys

import diffusers
import torch
import transformers

from rewards import RewardError

from .data import Prompt, conditions
from .errors import UserError
from .policy import Policy
from .self_check import self_check


def quiet_loading() -> None:
    """Progress bars of the libraries belong on a terminal only."""
    if not sys.stderr.isatty():
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()


def try_out(policy: Policy, prompt: Prompt) -> None:
    """The self-check, which is also the first time that the pipeline runs with the recipe's arguments."""
    try:
        self_check(policy, prompt.text, **conditions([prompt]))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if reason := explained(error):
            raise UserError(reason) from error
        given = ", ".join(f"{key}={value}" for key, value in policy.call.items())
        raise UserError(f"call: {type(policy.pipe).__name__} cannot run with {given}: {error}") from error


def explained(error: BaseException) -> str | None:
    """What the user has to mend; None where this program is at fault."""
    if isinstance(error, (RewardError, OSError)):
        return str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            "out of GPU memory: lower batch.rollout, batch.update or evaluation.batch, "
            "or set model.gradient_checkpointing=true"
        )
    return None
