"""The start-up self-check: does this pipeline meet the contract that rollout and replay rest on?

Two samples, three steps: a replay from the second step has to repeat the rollout's means, and its gradient has to reach
the trained weights. It costs four forward passes and turns what would be a wrong gradient into one line.
"""

from __future__ import annotations

import torch

from samplers import Moment, Recorded, Trajectory
from samplers.transitions import log_prob, log_ratio

from .errors import UserError
from .policy import Policy

STEPS = 3
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}  # of |log-ratio|


def self_check(policy: Policy, prompt: str) -> None:
    """Raises: UserError where the pipeline's loop cannot be replayed through its scheduler."""
    name, scheduler = type(policy.pipe).__name__, policy.scheduler
    window, scheduler.window = scheduler.window, (0, STEPS - 1)
    prompts, found = [prompt, prompt], []

    def visit(moment: Moment, recorded: Recorded) -> None:
        ratio = log_ratio(recorded.x_next, moment.mean, recorded.mean, moment.step.std)
        found.append(float(ratio.detach().abs().max()))
        if moment.output.requires_grad:
            log_prob(recorded.x_next, moment.mean, moment.step.std).sum().backward()

    short = {"num_inference_steps": STEPS, "output_type": "latent"}
    try:
        rollout = policy.rollout(prompts, [0, 1], [2, 3], [0, 1], **short)
        recorded = rollout.trajectory
        if [step.index for step in recorded.steps] != [0, 1]:
            raise UserError(f"model: {name} does not call its scheduler once a step; it cannot be aligned")
        policy.replay(Trajectory(recorded.steps[1:], recorded.injectable), prompts, visit, **short)
    finally:
        scheduler.window = window
    if not found or found[0] > TOLERANCE[policy.dtype]:
        raise UserError(
            f"model: a replay of {name} does not repeat its rollout (log-ratio off by {found[0] if found else '?'}); "
            "its loop keeps a state that the scheduler does not see"
        )
    without = [name for name, p in policy.parameters.items() if p.grad is None]
    for p in policy.parameters.values():
        p.grad = None
    if len(without) == len(policy.parameters):
        raise UserError(f"model: no gradient reaches the trained weights of {name}")
