"""The start-up self-check: does this pipeline meet the contract that rollout and replay rest on?

Two samples, four steps: a replay of the middle ones has to repeat the rollout's means, so that it may start anywhere
and carry one step's state to the next, and its gradient has to reach the trained weights. It costs six forward passes
and turns what would be a wrong gradient into one line.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from samplers import Moment, Recorded, Segment, Trajectory
from samplers.transitions import log_prob, log_ratio

from .errors import UserError
from .policy import Policy

STEPS = 4
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}  # of |log-ratio|


def self_check(policy: Policy, prompt: str, **call: Any) -> None:
    """Run the check on two samples of a prompt.

    Args:
        call: what the prompt brings with it, as an image.
    Raises: UserError where the pipeline's loop cannot be replayed through its scheduler.
    """
    name = type(policy.pipe).__name__
    prompts, found = [prompt, prompt], []

    def visit(moment: Moment, recorded: Recorded) -> None:
        std = moment.step.std or 1.0  # without noise, as kernel ode has it, means are compared at unit noise
        ratio = log_ratio(recorded.x_next, moment.mean, recorded.mean, std)
        found.append(float(ratio.detach().abs().max()))
        if moment.output.requires_grad:
            log_prob(recorded.x_next, moment.mean, std).sum().backward()

    short = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    trajectory = _rollout(policy, prompts, short)
    if [step.index for step in trajectory.steps] != [0, 1, 2]:
        raise UserError(f"model: {name} does not call its scheduler once a step; it cannot be aligned")
    policy.replay(replace(trajectory, steps=trajectory.steps[1:]), prompts, visit, **short)
    if len(found) != 2 or not all(ratio <= TOLERANCE[policy.dtype] for ratio in found):  # NaN fails too
        raise UserError(
            f"model: a replay of {name} does not repeat its rollout (log-ratios off by {found}); "
            "its loop keeps a state that the scheduler does not see"
        )
    policy.injectable = trajectory.injectable
    reached = any(p.grad is not None for p in policy.parameters.values())
    for p in policy.parameters.values():
        p.grad = None
    if not reached and policy.moves_output:
        raise UserError(f"model: no gradient reaches the trained weights of {name}")


def takes_levels_each(policy: Policy, prompt: str, **call: Any) -> bool:
    """Whether each sample of a visit may have a noise level of its own (see `Trajectory.noised`); after `self_check`.

    Pipelines that choose an expert by the timestep, or double the batch for guidance but not the timesteps, cannot do
    that. Clean state and noise are one and the same here, and so is then the state at all levels: what differs between
    two levels is what the network makes of the timestep, and a sample has to get that of its own.

    Args:
        call: what the prompt brings with it, as an image; and arguments of the pipeline that training changes.
    """
    prompts, low, high = [prompt, prompt], 0.25, 0.75
    short = {"num_inference_steps": STEPS, "output_type": "latent", **call}
    first = policy.rollout(prompts, [0, 1], [2, 3], [0], segment=Segment([0]), **short).trajectory
    state = first.steps[0].x

    def outputs(levels: list[Any]) -> list[Tensor]:
        found: list[Tensor] = []
        noised = first.noised(state, levels, [state] * len(levels))
        policy.replay(noised, prompts, lambda moment, recorded: found.append(moment.output.float()), **short)
        return found

    with torch.no_grad():
        shared_high, shared_low = outputs([high, low])
        try:
            (each,) = outputs([(high, low)])
        except (ValueError, TypeError, IndexError, RuntimeError):
            return False
    error = (each - torch.stack([shared_high[0], shared_low[1]])).abs().max()
    return bool(error < 0.01 * (shared_high - shared_low).abs().amax())


def _rollout(policy: Policy, prompts: list[str], call: dict[str, Any]) -> Trajectory:
    """A rollout with noise in all steps but the last; finds out how the pipeline wants the image, if there is one.

    Of two samples with one image Wan's pipelines take it once, those of LTX, HunyuanVideo and CogVideoX twice.
    """
    noisy = range(STEPS - 1)

    def run() -> Trajectory:
        return policy.rollout(prompts, [0, 1], [2, 3], noisy, stochastic=noisy, **call).trajectory

    try:
        return run()
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        if "image" not in call:
            raise
        policy.image_each = True
        try:
            return run()
        except (ValueError, TypeError, IndexError, RuntimeError):
            raise error from None
